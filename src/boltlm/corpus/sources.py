"""Where documents come from: `corpus.kind` is generated, files, hub or gsm8k."""

import bisect
import glob
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from pyarrow import ArrowInvalid

from boltlm.corpus import generated
from boltlm.corpus.chunks import sentences
from boltlm.errors import UserError
from boltlm.params import build, section
from boltlm.records import Document, Question
from boltlm.seeds import uniform

GSM8K_HUB = "openai/gsm8k"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """A column that lists the pieces of the text in order, each with its own latent: `column`, and
    the fields `text` and `latent` of an entry. The authors' released data are
    `{column: chunks, text: suffix, latent: latent}`."""

    column: str
    text: str
    latent: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which columns of the source hold what; null where the source has none."""

    text: str
    doc_id: str | None
    latent: str | None
    pieces: Pieces | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Params of `kind: files`: JSONL (also .gz) or Parquet, by path or glob pattern.

    `shuffle_buffer`: documents held while shuffling (0: the files' own order); as large as the
    corpus, it shuffles perfectly.
    """

    kind: Literal["files"]
    path: str
    columns: Columns
    shuffle_buffer: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Hub:
    """Params of `kind: hub`: a Hugging Face data set, streamed."""

    kind: Literal["hub"]
    name: str
    config: str | None
    split: str
    columns: Columns
    shuffle_buffer: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GSM8K:
    """Params of `kind: gsm8k`: question and final answer as the text, the human-written
    derivation as the latent. `path`: the authors' JSONL (also .gz), or null for the hub."""

    kind: Literal["gsm8k"]
    path: str | None
    split: Literal["train", "test"]
    shuffle_buffer: int


Source = generated.Generated | Files | Hub | GSM8K
KINDS: dict[str, type[Any]] = {
    "generated": generated.Generated,
    "files": Files,
    "hub": Hub,
    "gsm8k": GSM8K,
}


def source(params: Mapping[str, Any], corpus: str) -> Source:
    """The source of `corpora.<corpus>`: the `corpus` section with that entry's keys laid over.

    An override with another `kind` stands alone.
    """
    return resolve(params, section(params, f"corpora.{corpus}.source"), f"corpora.{corpus}.source")


def resolve(params: Mapping[str, Any], override: Any, where: str) -> Source:
    main = section(params, "corpus")
    if not isinstance(override, Mapping):
        raise UserError(f"params.yaml: {where} must be a mapping ({{}}: as `corpus`)")
    values = override if override.get("kind", main.get("kind")) != main.get("kind") else main
    values = {**values, **override}
    kind = values.get("kind")
    if kind not in KINDS:
        raise UserError(f"params.yaml: {where}: kind must be {' | '.join(KINDS)}, found {kind!r}")
    return build(KINDS[kind], values, where)


def documents(config: Source, seed: int) -> Iterator[Document]:
    """The source's documents in the order in which corpora take them."""
    if isinstance(config, generated.Generated):
        found: Iterator[Document] = generated.documents(config, seed)
    elif isinstance(config, GSM8K):
        found = (_gsm8k_document(row, i, config.split) for i, row in _gsm8k_rows(config))
    elif isinstance(config, Files):
        found = _files(config)
    else:
        found = _mapped(
            hub_rows(config.name, config.config, config.split), config.columns, config.name
        )
    return _shuffled(found, config.shuffle_buffer, seed)


def questions(config: Source, seed: int) -> Iterator[Question]:
    """The source's questions. Raises UserError for kinds that have none."""
    if isinstance(config, generated.Generated):
        return generated.questions(config, seed)
    if isinstance(config, GSM8K):
        return (_gsm8k_question(row, i, config.split) for i, row in _gsm8k_rows(config))
    raise UserError(f"corpus kind '{config.kind}' has no questions; set questions.count to 0")


def _shuffled(found: Iterable[Document], buffer: int, seed: int) -> Iterator[Document]:
    """A shuffle that depends on ids: each new document takes the place of one of `buffer` held
    ones, which leaves; the rest leave in the order of their keys."""
    if buffer == 0:
        yield from found
        return
    held: list[Document] = []
    for document in found:
        if len(held) < buffer:
            held.append(document)
            continue
        place = int(uniform(seed, "place", document.doc_id) * buffer)
        leaving, held[place] = held[place], document
        yield leaving
    yield from sorted(held, key=lambda document: uniform(seed, "order", document.doc_id))


def _files(config: Files) -> Iterator[Document]:
    paths = sorted(glob.glob(config.path))
    if not paths:
        raise UserError(f"corpus path '{config.path}': no such file; give a path or glob pattern")
    names = [Path(path).name for path in paths]
    if len(set(names)) < len(names):  # ids must differ, and not name a place of this machine
        shared = os.path.commonpath(paths)
        names = [os.path.relpath(path, shared) for path in paths]
    for path, origin in zip(paths, names, strict=True):
        rows = parquet_rows(path) if path.endswith(".parquet") else json_rows(path)
        yield from _mapped(rows, config.columns, origin)


def json_rows(path: str) -> Iterator[dict[str, Any]]:
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: expected an object a line (JSONL)")
                yield row
    except (gzip.BadGzipFile, zlib.error, UnicodeDecodeError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 JSONL: {error}") from error


def parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from error


def hub_rows(name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        found = datasets.load_dataset(name, config, split=split, streaming=True)
        for row in found:
            yield dict(row)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Hugging Face data set '{name}' ({split}): {reason}") from error


def _mapped(rows: Iterable[Mapping[str, Any]], columns: Columns, origin: str) -> Iterator[Document]:
    for index, row in enumerate(rows):
        pieces = columns.pieces.column if columns.pieces else None
        for column in (columns.text, columns.doc_id, columns.latent, pieces):
            if column is not None and column not in row:
                raise UserError(
                    f"{origin}, row {index + 1}: no column '{column}'; it has {', '.join(row)}"
                )
        text = row[columns.text]
        where = f"{origin}, row {index + 1}"
        if not isinstance(text, str):
            raise UserError(f"{where}: column '{columns.text}' is not text")
        yield Document(
            doc_id=str(row[columns.doc_id]) if columns.doc_id else f"{origin}:{index}",
            text=text,
            source=origin,
            latent=row[columns.latent] if columns.latent else None,
            thoughts=_thoughts(row, text, columns.pieces, where) if columns.pieces else None,
        )


def _thoughts(row: Mapping[str, Any], text: str, names: Pieces, where: str) -> tuple[str, ...]:
    """The latent of the piece in which each sentence begins, white space before it aside."""
    try:
        pieces = [(piece[names.text], piece[names.latent] or "") for piece in row[names.column]]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{where}: column '{names.column}' does not list pieces with the fields"
            f" '{names.text}' and '{names.latent}'"
        ) from error
    if "".join(piece for piece, _ in pieces) != text:
        raise UserError(f"{where}: the pieces in '{names.column}' do not join to the text")
    ends = list(itertools.accumulate(len(piece) for piece, _ in pieces))
    thoughts: list[str] = []
    start = 0
    for sentence in sentences(text):
        begin = start + len(sentence) - len(sentence.lstrip())
        place = bisect.bisect_right(ends, min(begin, len(text) - 1))
        thoughts.append(pieces[place][1])
        start += len(sentence)
    return tuple(thoughts)


def _gsm8k_rows(config: GSM8K) -> Iterator[tuple[int, dict[str, Any]]]:
    if config.path is None:
        return enumerate(hub_rows(GSM8K_HUB, "main", config.split))
    if not Path(config.path).is_file():
        raise UserError(f"corpus path '{config.path}': no such file; give GSM8K's JSONL, or null")
    return enumerate(json_rows(config.path))


def gsm8k_parts(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """(question, derivation without the calculator's <<…>> marks, final answer) of a row."""
    if "question" not in row or "answer" not in row:
        raise UserError(f"GSM8K rows need 'question' and 'answer'; found {', '.join(row)}")
    derivation, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise UserError(f"GSM8K answer without '####': {row['answer'][-60:]!r}")
    return row["question"], re.sub(r"<<[^>]*>>", "", derivation).strip(), answer.strip()


def _gsm8k_document(row: Mapping[str, Any], index: int, split: str) -> Document:
    question, derivation, answer = gsm8k_parts(row)
    return Document(
        doc_id=f"gsm8k-{split}-{index:05d}",
        text=f"{question}\n{gsm8k_answer(answer)}",
        source="gsm8k",
        latent=derivation,
    )


def gsm8k_answer(answer: str) -> str:
    return f"The answer is {answer}."


def _gsm8k_question(row: Mapping[str, Any], index: int, split: str) -> Question:
    question, derivation, answer = gsm8k_parts(row)
    return Question(
        question_id=f"gsm8k-{split}-{index:05d}",
        prompt=question,
        answer=answer,
        latent=derivation,
    )
