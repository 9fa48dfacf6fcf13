"""Where documents come from: generated pages, files, a data set of the hub, GSM8K or MATH."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from boltlm.corpus.benchmarks import BenchmarkItem, read_benchmark
from boltlm.corpus.generated import GeneratedSource, generate_documents, generate_questions
from boltlm.corpus.pieces import PieceColumns, read_pieces
from boltlm.corpus.readers import (
    DATA_FILE_TYPES,
    is_file_name,
    optional_text,
    read_jsonl,
    read_label,
    read_rows,
    read_text,
    split_revision,
    stream_hub,
)
from boltlm.corpus.shuffle import shuffled
from boltlm.corpus.text_files import TextsSource, file_names, find_files, read_texts
from boltlm.errors import UserError
from boltlm.param_types import NonNegativeInt, Text
from boltlm.records import Document, Question

GSM8K_STEM = "The answer is"


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnMapping:
    """The source's column for each field of a document; null where the source has none. `cluster`:
    what makes documents dependent, such as their book or site. `text: null` takes the pieces,
    joined, as the text."""

    text: Text | None
    doc_id: Text | None
    cluster: Text | None
    latent: Text | None
    pieces: PieceColumns | None

    def __post_init__(self) -> None:
        if self.text is None and self.pieces is None:
            raise UserError("text must name a column unless pieces does, found null for both")


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesSource:
    """JSONL (also .gz) or Parquet files, given by a path, a folder or a glob pattern.

    `shuffle_buffer`: number of documents in the shuffle buffer. 0 leaves the documents in file
    order; a buffer as large as the source shuffles it uniformly, and so does null, with sorted
    temporary files in place of the buffer.
    """

    kind: Literal["files"]
    path: Text
    columns: ColumnMapping
    shuffle_buffer: NonNegativeInt | None


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    """A data set of the Hugging Face hub, streamed; `name` may end in `@<revision>`.
    `shuffle_buffer` as in `FilesSource`."""

    kind: Literal["hub"]
    name: Text
    config: str | None
    split: Text
    columns: ColumnMapping
    shuffle_buffer: NonNegativeInt | None


@dataclass(frozen=True, kw_only=True, slots=True)
class GSM8KSource:
    """GSM8K: the question and the final answer are the text, the human-written derivation is the
    latent. `path`: the authors' JSONL (also .gz), or the data set's name on the hub, which may end
    in `@<revision>`. `shuffle_buffer` as in `FilesSource`."""

    kind: Literal["gsm8k"]
    path: Text
    split: Literal["train", "test"]
    shuffle_buffer: NonNegativeInt | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MATHSource:
    """MATH: the problem and the final answer are the text, the human-written solution is the
    latent. `path`: JSONL (also .gz) or Parquet files, or the data set's name on the hub, which may
    end in `@<revision>`. `shuffle_buffer` as in `FilesSource`."""

    kind: Literal["math"]
    path: Text
    split: Literal["train", "test"]
    shuffle_buffer: NonNegativeInt | None


CorpusSource = GeneratedSource | FilesSource | TextsSource | HubSource | GSM8KSource | MATHSource


def local_path(config: CorpusSource) -> str | None:
    """The path or glob pattern of the local files that a source reads, if it reads any."""
    if isinstance(config, GSM8KSource | MATHSource):
        return config.path if is_file_name(config.path) else None
    return config.path if isinstance(config, FilesSource | TextsSource) else None


def read_documents(config: CorpusSource, seed: int) -> Iterator[Document]:
    """The documents of a source in the order in which the corpora take them.

    Raises UserError where a file, a column or the data set is missing or cannot be read.
    """
    documents: Iterator[Document]
    if isinstance(config, GeneratedSource):
        documents = generate_documents(config, seed)
    elif isinstance(config, GSM8KSource):
        documents = (_gsm8k_document(row, i, config) for i, row in _gsm8k_rows(config))
    elif isinstance(config, MATHSource):
        items = read_benchmark("math", config.path, config.split)
        documents = map(_math_document, items)
    elif isinstance(config, FilesSource):
        documents = _file_documents(config)
    elif isinstance(config, TextsSource):
        documents = read_texts(config)
    else:
        rows = stream_hub(config.name, config.config, config.split)
        documents = _mapped_documents(rows, config.columns, split_revision(config.name)[0])
    return shuffled(documents, config.shuffle_buffer, seed)


def read_questions(config: CorpusSource, seed: int) -> Iterator[Question]:
    """The questions of a source. Raises UserError for the kinds that have none."""
    if isinstance(config, GeneratedSource):
        return generate_questions(config, seed)
    if isinstance(config, GSM8KSource):
        return (_gsm8k_question(row, i, config) for i, row in _gsm8k_rows(config))
    raise UserError(f"corpus kind '{config.kind}' has no questions; set questions.count to 0")


def parse_gsm8k_row(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """(question, derivation without calculator annotations <<…>>, final answer) of a row.

    Raises UserError where a column or the mark #### before the final answer is missing.
    """
    if "question" not in row or "answer" not in row:
        raise UserError(f"GSM8K rows need 'question' and 'answer'; this one has {', '.join(row)}")
    question, solution = (read_text(row, name, "GSM8K") for name in ("question", "answer"))
    derivation, mark, answer = solution.rpartition("####")
    if not mark:
        raise UserError(f"GSM8K answer without '####': {solution[-60:]!r}")
    if not answer.strip():
        raise UserError(f"GSM8K answer without a number after '####': {solution[-60:]!r}")
    return question, re.sub(r"<<[^>]*>>", "", derivation).strip(), answer.strip()


def format_gsm8k_answer(answer: str) -> str:
    """The sentence in which a GSM8K document states its final answer."""
    return f"{GSM8K_STEM} {answer}."


def _file_documents(config: FilesSource) -> Iterator[Document]:
    paths = find_files(config.path, DATA_FILE_TYPES)
    for path, name in zip(paths, file_names(paths), strict=True):
        yield from _mapped_documents(read_rows(path), config.columns, name)


def _mapped_documents(
    rows: Iterable[Mapping[str, Any]], columns: ColumnMapping, source: str
) -> Iterator[Document]:
    """The rows as documents. Raises UserError where a row lacks a column or its text."""
    for index, row in enumerate(rows):
        pieces = columns.pieces.column if columns.pieces else None
        location = f"{source}, row {index + 1}"
        for column in (columns.text, columns.doc_id, columns.cluster, columns.latent, pieces):
            if column is not None and column not in row:
                raise UserError(f"{location}: no column '{column}'; the row has {', '.join(row)}")
        # A text without a UTF-8 encoding is dropped, and counted, by the stage `split`.
        text = None if columns.text is None else row[columns.text]
        if columns.text is not None and not isinstance(text, str):
            raise UserError(f"{location}: column '{columns.text}' is not text, found {text!r:.60}")
        listed = read_pieces(row, text, columns.pieces, location) if columns.pieces else []
        has_cluster = columns.cluster and row[columns.cluster] is not None
        yield Document(
            doc_id=read_label(row, columns.doc_id, location)
            if columns.doc_id
            else f"{source}:{index}",
            text="".join(piece for piece, _ in listed) if text is None else text,
            source=source,
            cluster=read_label(row, columns.cluster, location)
            if columns.cluster and has_cluster
            else None,
            latent=optional_text(row, columns.latent, location) if columns.latent else None,
            thoughts=tuple(latent for _, latent in listed) if columns.pieces else None,
            pieces=tuple(len(piece) for piece, _ in listed) if columns.pieces else None,
        )


def _gsm8k_rows(config: GSM8KSource) -> Iterator[tuple[int, dict[str, Any]]]:
    if not is_file_name(config.path):
        return enumerate(stream_hub(config.path, "main", config.split))
    if not Path(config.path).is_file():
        raise UserError(
            f"corpus path '{config.path}': no such file; give GSM8K's JSONL, or openai/gsm8k"
        )
    return enumerate(read_jsonl(config.path))


def _parsed_gsm8k(row: Mapping[str, Any], index: int, path: str) -> tuple[str, str, str]:
    """`parse_gsm8k_row` of a row of a file or data set, which errors name."""
    try:
        return parse_gsm8k_row(row)
    except UserError as error:
        raise UserError(f"{path}, row {index + 1}: {error}") from error


def _gsm8k_document(row: Mapping[str, Any], index: int, config: GSM8KSource) -> Document:
    question, derivation, answer = _parsed_gsm8k(row, index, config.path)
    return Document(
        doc_id=f"gsm8k-{config.split}-{index:05d}",
        text=f"{question}\n{format_gsm8k_answer(answer)}",
        source="gsm8k",
        latent=derivation,
    )


def _gsm8k_question(row: Mapping[str, Any], index: int, config: GSM8KSource) -> Question:
    question, derivation, answer = _parsed_gsm8k(row, index, config.path)
    return Question(
        question_id=f"gsm8k-{config.split}-{index:05d}",
        subject="",
        prompt=question,
        stem=GSM8K_STEM,
        answer=answer,
        latent=derivation,
    )


def boxed_answer(solution: str) -> str:
    r"""The final answer of a solution of MATH: what is in its last \boxed{…}, or after its last
    \boxed up to the end of the formula. Raises UserError where there is none."""
    _, mark, rest = solution.rpartition(r"\boxed")
    if rest.startswith("{"):
        depths = itertools.accumulate(
            rest, lambda depth, c: depth + (c == "{") - (c == "}"), initial=0
        )
        ends = (end for end, depth in enumerate(depths) if end and depth == 0)
        answer = rest[1 : next(ends, 1) - 1]
    else:
        answer = rest.partition("$")[0]
    if not (mark and answer.strip()):
        raise UserError(rf"MATH solution without an answer in \boxed: {solution[-60:]!r}")
    return answer.strip()


def _math_document(item: BenchmarkItem) -> Document:
    """A problem, and its answer in the sentence that Minerva's examples end with."""
    statement = f"The final answer is ${boxed_answer(item.solution)}$. I hope it is correct."
    return Document(
        doc_id=item.item_id,
        text=f"{item.question}\nFinal Answer: {statement}",
        source="math",
        latent=item.solution,
    )
