"""Sources: the same documents from every file format, shuffled by their ids."""

import gzip
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from boltlm.corpus import sources
from boltlm.corpus.corpora import CorpusEntry
from boltlm.corpus.sources import (
    ColumnMapping,
    CorpusSource,
    FilesSource,
    GSM8KSource,
    HubSource,
    MATHSource,
    PieceColumns,
)
from boltlm.errors import UserError
from boltlm.params import build_settings
from boltlm.records import Document
from tests import tiny

TEXT_COLUMN = ColumnMapping(text="body", doc_id=None, cluster=None, latent=None, pieces=None)
COLUMNS = replace(TEXT_COLUMN, doc_id="key", latent="thought")
ROWS: list[dict[str, Any]] = [
    {"body": f"Text {i}.\n\x85 é \r\nEnd\u2028", "key": f"k{i}", "thought": f"because {i}"}
    for i in range(40)
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    path.write_bytes(text.encode())
    return path


def write_gzip(path: Path, rows: list[dict[str, Any]]) -> Path:
    plain = write_jsonl(path.with_suffix(".plain"), rows)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def files_source(path: str) -> FilesSource:
    """MAIN with another path."""
    return FilesSource(kind="files", path=path, columns=TEXT_COLUMN, shuffle_buffer=0)


def files(
    path: Path | str,
    columns: ColumnMapping = COLUMNS,
    shuffle_buffer: int | None = 0,
    seed: int = 1,
) -> list[Document]:
    config = FilesSource(
        kind="files", path=str(path), columns=columns, shuffle_buffer=shuffle_buffer
    )
    return list(sources.read_documents(config, seed))


def ids(documents: list[Document]) -> list[str]:
    return [document.doc_id for document in documents]


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "rows.jsonl": write_jsonl,
    "rows.jsonl.gz": write_gzip,
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    """The file format is not part of the experiment; the text is preserved exactly."""
    assert files(WRITERS[name](tmp_path / name, ROWS)) == [
        Document(doc_id=row["key"], text=row["body"], source=name, latent=row["thought"])
        for row in ROWS
    ]


def test_columns_may_be_absent(tmp_path: Path) -> None:
    """Without a column of ids, the id is made of file and row; without latents, they are None."""
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    documents = files(path, TEXT_COLUMN)
    assert ids(documents) == ["a.jsonl:0", "a.jsonl:1"]
    assert [document.latent for document in documents] == [None, None]
    assert [document.cluster for document in documents] == [None, None]


def test_a_column_may_name_what_makes_documents_dependent(tmp_path: Path) -> None:
    """Numbers become names; a document without an entry is independent."""
    rows = [{"body": "x", "site": site} for site in ("a.org", 7, None)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    documents = files(path, replace(TEXT_COLUMN, cluster="site"))
    assert [document.cluster for document in documents] == ["a.org", "7", None]


def test_a_pattern_takes_every_file_in_order(tmp_path: Path) -> None:
    """Several files are one corpus, whatever the order in which the file system lists them."""
    for part in (2, 0, 1):
        write_jsonl(tmp_path / f"part{part}.jsonl", ROWS[part * 10 : part * 10 + 10])
    assert ids(files(tmp_path / "part*.jsonl")) == [f"k{i}" for i in range(30)]


def test_files_with_one_name_in_two_folders_have_different_ids(tmp_path: Path) -> None:
    """Every later stage joins by doc_id and would merge two documents with one id."""
    for folder in ("algebra", "calculus"):
        write_jsonl(tmp_path / folder / "train.jsonl", ROWS[:3])
    documents = files(tmp_path / "*" / "train.jsonl", TEXT_COLUMN)
    assert len(set(ids(documents))) == len(documents) == 6


def test_a_large_buffer_shuffles_by_id_alone(tmp_path: Path) -> None:
    """If the buffer is as large as the corpus, the order does not depend on that in the file, but
    does depend on the seed."""
    forward = write_jsonl(tmp_path / "forward.jsonl", ROWS)
    backward = write_parquet(tmp_path / "backward.parquet", ROWS[::-1])
    shuffled = ids(files(forward, shuffle_buffer=len(ROWS)))
    assert sorted(shuffled) == sorted(row["key"] for row in ROWS)
    assert shuffled != [row["key"] for row in ROWS]
    assert ids(files(backward, shuffle_buffer=len(ROWS))) == shuffled
    assert ids(files(forward, shuffle_buffer=1000)) == shuffled
    assert ids(files(backward, shuffle_buffer=None)) == shuffled
    assert ids(files(forward, shuffle_buffer=len(ROWS), seed=2)) != shuffled


@pytest.mark.parametrize("buffer", [0, 1, 7, 39])
def test_a_small_buffer_loses_nothing(tmp_path: Path, buffer: int) -> None:
    """A document that is in the buffer when the source ends must be yielded."""
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert sorted(ids(files(path, shuffle_buffer=buffer))) == sorted(row["key"] for row in ROWS)


def test_a_small_buffer_still_shuffles_late_documents(tmp_path: Path) -> None:
    """Shuffling continues throughout a long source: with a buffer of B, a document waits for about
    B others, and about 1 in B documents is yielded as soon as it is replaced."""
    rows = [{"body": "x", "key": f"{i:05d}", "thought": ""} for i in range(4000)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    order = [int(key) for key in ids(files(path, shuffle_buffer=50))]
    late = order[2000:3900]
    unshuffled = sum(key == index + 50 for index, key in enumerate(late, 2000))
    assert unshuffled / len(late) < 0.1


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("column", ["text", "doc_id", "cluster", "latent"])
def test_a_wrong_column_is_named(tmp_path: Path, name: str, column: str) -> None:
    """The most common mistake with a new data set: the error names the column, the file, and the
    columns that exist."""
    path = WRITERS[name](tmp_path / name, ROWS)
    columns = replace(TEXT_COLUMN, **{column: "absent"})
    with pytest.raises(UserError, match=rf"{name}.*'absent'.*body, key, thought"):
        files(path, columns)


def test_a_column_that_is_not_text_is_named(tmp_path: Path) -> None:
    """A number or a list would fail later, in the tokenizer."""
    path = write_jsonl(tmp_path / "a.jsonl", [{**ROWS[0], "body": 3}])
    with pytest.raises(UserError, match=r"a\.jsonl.*row 1.*'body'"):
        files(path)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    """Before anything is trained."""
    with pytest.raises(UserError, match=r"nowhere.*no such file"):
        files(tmp_path / "nowhere*.jsonl")
    config = GSM8KSource(
        kind="gsm8k", path=str(tmp_path / "nowhere"), split="train", shuffle_buffer=0
    )
    with pytest.raises(UserError, match="nowhere"):
        list(sources.read_documents(config, 1))


CORRUPT = {
    "text.jsonl": b'{"body": "x"}\nnot json\n',
    "list.jsonl": b'{"body": "x"}\n[1, 2]\n',
    "latin.jsonl": b'{"body": "\xe9"}\n',
    "plain.jsonl.gz": b'{"body": "x"}\n',
    "short.jsonl.gz": gzip.compress(b'{"body": "x"}\n' * 1000)[:-12],
    "damaged.jsonl.gz": gzip.compress(b"")[:10] + b"\x07" + b"\x00" * 20,
    "text.parquet": b'{"body": "x"}\n',
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_file_is_named(tmp_path: Path, name: str) -> None:
    """An incomplete or corrupt download must end in an error that names the file."""
    (tmp_path / name).write_bytes(CORRUPT[name])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        files(tmp_path / name, TEXT_COLUMN)


def test_a_corrupt_line_is_numbered(tmp_path: Path) -> None:
    """In a file of millions of lines the number is needed to find it."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n\n{"body": \n', encoding="utf-8")
    with pytest.raises(UserError, match="line 3"):
        files(path, TEXT_COLUMN)


def gsm8k_row(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": answer}


GSM8K_ROWS = [
    gsm8k_row("How many?", "He has 2*3=<<2*3=6>>6.\nThen 6+1=<<6+1=7>>7.\n#### 7"),
    gsm8k_row("What costs it?", "It costs $1,000.\n#### 1,000"),
]


def gsm8k(tmp_path: Path, rows: list[dict[str, str]]) -> GSM8KSource:
    path = write_jsonl(tmp_path / "gsm8k.jsonl", rows)
    return GSM8KSource(kind="gsm8k", path=str(path), split="test", shuffle_buffer=0)


def test_gsm8k_is_question_answer_and_derivation(tmp_path: Path) -> None:
    """The calculator annotations are removed; the answer is what follows ####."""
    config = gsm8k(tmp_path, GSM8K_ROWS)
    first, second = sources.read_documents(config, 1)
    assert first == Document(
        doc_id="gsm8k-test-00000",
        text="How many?\nThe answer is 7.",
        source="gsm8k",
        latent="He has 2*3=6.\nThen 6+1=7.",
    )
    assert second.text == "What costs it?\nThe answer is 1,000."
    questions = list(sources.read_questions(config, 1))
    assert [(q.prompt, q.stem, q.answer) for q in questions] == [
        ("How many?", "The answer is", "7"),
        ("What costs it?", "The answer is", "1,000"),
    ]
    assert questions[0].latent == first.latent


def test_a_gsm8k_row_without_the_answer_mark_is_named(tmp_path: Path) -> None:
    """A derivation that is mistaken for an answer would become training text."""
    with pytest.raises(UserError, match=r"####.*so seven"):
        list(sources.read_documents(gsm8k(tmp_path, [gsm8k_row("How many?", "so seven")]), 1))
    with pytest.raises(UserError, match="'question' and 'answer'"):
        list(sources.read_questions(gsm8k(tmp_path, [{"question": "x"}]), 1))


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"So $x = \boxed{2}$, not $\boxed{3}$.", "3"),
        (r"$\boxed{\frac{1}{\sqrt{2}}}$ and $\frac{a}{b}$", r"\frac{1}{\sqrt{2}}"),
        (r"It is $\boxed 7$, so 7.", "7"),
        (r"It is $\boxed{ (-\infty, 3] }$", r"(-\infty, 3]"),
    ],
)
def test_the_boxed_answer_of_a_solution(solution: str, answer: str) -> None:
    """The last one, with nested braces."""
    assert sources.boxed_answer(solution) == answer


@pytest.mark.parametrize(
    "solution", ["It is 7.", r"$\boxed{}$", r"$\boxed{\frac{1}{2}$", r"\boxed"]
)
def test_a_solution_without_an_answer_is_named(solution: str, tmp_path: Path) -> None:
    """It would become a question without an answer."""
    row = {"problem": "x?", "solution": solution, "type": "Algebra"}
    path = write_jsonl(tmp_path / "math.jsonl", [row])
    config = MATHSource(kind="math", path=str(path), split="train", shuffle_buffer=0)
    with pytest.raises(UserError, match=r"MATH solution without an answer in .boxed"):
        list(sources.read_documents(config, 1))


def test_math_is_problem_answer_and_solution(tmp_path: Path) -> None:
    """From a file; ids as those of the benchmark, but of the split `train`."""
    solution = r"Adding, $1 + 1 = \boxed{2}$."
    row = {"problem": "What is $1 + 1$?", "solution": solution, "type": "Algebra"}
    path = write_jsonl(tmp_path / "math.jsonl", [row])
    config = MATHSource(kind="math", path=str(path), split="train", shuffle_buffer=0)
    assert list(sources.read_documents(config, 1)) == [
        Document(
            doc_id="math-algebra-train-00000",
            text="What is $1 + 1$?\nFinal Answer: The final answer is $2$. I hope it is correct.",
            source="math",
            latent=solution,
        )
    ]
    with pytest.raises(UserError, match="corpus kind 'math' has no questions"):
        sources.read_questions(config, 1)


def test_the_original_gsm8k_parses() -> None:
    """Every row of the original file has a derivation without annotations and a numeric answer."""
    path = tiny.SHARED / "eval" / "gsm8k_test.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} does not exist; GSM8K is not part of the repository")
    config = GSM8KSource(kind="gsm8k", path=str(path), split="test", shuffle_buffer=0)
    questions = list(sources.read_questions(config, 1))
    assert len(questions) == 1319
    for question in questions:
        assert question.latent
        assert "<<" not in question.latent
        assert ">>" not in question.latent
        float(question.answer.replace(",", ""))


MAIN: dict[str, Any] = {
    "kind": "files",
    "path": "a.jsonl",
    "columns": asdict(TEXT_COLUMN),
    "shuffle_buffer": 0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CorporaSettings:
    """The section `corpora` alone."""

    corpora: Mapping[str, CorpusEntry]


def corpus_sources(**overrides: Mapping[str, Any]) -> dict[str, CorpusSource]:
    """The sources of corpora whose entries have these `source` sections, with MAIN as `corpus`."""
    corpora = {name: {"documents": 1, "source": source} for name, source in overrides.items()}
    params = {"corpus": MAIN, "corpora": corpora}
    entries = build_settings(CorporaSettings, params).corpora
    return {name: entry.source for name, entry in entries.items()}


def test_a_corpus_overrides_keys_of_the_main_source() -> None:
    """If the kind is the same, keys that are not given are those of `corpus`; a source of another
    kind must be complete."""
    other = {"kind": "gsm8k", "path": "openai/gsm8k", "split": "train", "shuffle_buffer": 0}
    assert corpus_sources(same={}, moved={"path": "b.jsonl"}, other=other) == {
        "same": files_source("a.jsonl"),
        "moved": files_source("b.jsonl"),
        "other": GSM8KSource(kind="gsm8k", path="openai/gsm8k", split="train", shuffle_buffer=0),
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"kind": "web"}, r"corpora\.x\.source.*kind.*'web'"),
        ({"kind": "gsm8k"}, r"missing key corpora\.x\.source\.path"),
        ({"shuffle_buffer": -1}, r"corpora\.x\.source\.shuffle_buffer must be 0 or more"),
        ({"pth": "b"}, r"unknown key corpora\.x\.source\.pth"),
        ({"path": 3}, r"corpora\.x\.source\.path must be of type str"),
    ],
)
def test_a_wrong_source_names_its_key(override: dict[str, Any], message: str) -> None:
    """A misspelt key in params.yaml must not fall back to the main source."""
    with pytest.raises(UserError, match=message):
        corpus_sources(x=override)


def test_kinds_without_questions_say_so() -> None:
    """Plain files have no questions; the message says what to do."""
    with pytest.raises(UserError, match=r"'files'.*questions\.count"):
        sources.read_questions(files_source("a.jsonl"), 1)
    assert len(list(itertools.islice(sources.read_questions(tiny.pages(), 1), 3))) == 3


CHUNKS = [
    {"suffix": "One is. Two is.", "latent": "why one and two"},
    {"suffix": " Three", "latent": "why three"},
    {"suffix": " is. Four is.", "latent": None},
]


def test_pieces_are_read_with_their_latents(tmp_path: Path) -> None:
    """The format of the authors' released data: a list of chunks, each with its own latent."""
    text = "".join(str(chunk["suffix"]) for chunk in CHUNKS)
    names = PieceColumns(column="chunks", text="suffix", latent="latent")
    columns = replace(TEXT_COLUMN, text="text", pieces=names)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text, "chunks": CHUNKS}) + "\n", encoding="utf-8")
    (document,) = files(path, columns)
    assert document.text == text
    assert document.pieces == (15, 6, 13)
    assert document.thoughts == ("why one and two", "why three", None)
    for row in (
        {"text": "Another.", "chunks": CHUNKS},
        {"text": text, "chunks": [{"suffix": "x"}]},
        {"text": text, "chunks": [{"suffix": text, "latent": ["two", "latents"]}]},
    ):
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"row 1: .*'chunks'"):
            files(path, columns)


def test_the_text_can_be_that_of_the_pieces(tmp_path: Path) -> None:
    """The authors' chunks lack the blank lines at the beginning of a document."""
    names = PieceColumns(column="chunks", text="suffix", latent="latent")
    columns = replace(TEXT_COLUMN, text=None, pieces=names)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "\n One", "chunks": CHUNKS}) + "\n", encoding="utf-8")
    (document,) = files(path, columns)
    assert document.text == "".join(str(chunk["suffix"]) for chunk in CHUNKS)
    with pytest.raises(UserError, match=r"text must name a column"):
        replace(columns, pieces=None)


def hub(name: str) -> HubSource:
    pieces = PieceColumns(column="chunks", text="suffix", latent="latent")
    columns = replace(TEXT_COLUMN, text="text", doc_id="id", pieces=pieces)
    return HubSource(
        kind="hub", name=name, config=None, split="train", columns=columns, shuffle_buffer=0
    )


def test_a_hub_data_set_is_streamed_with_its_latents(tmp_path: Path) -> None:
    """With the `datasets` library, which accepts a folder in place of a name; the rows have the
    format of the authors' released data."""
    text = "".join(str(chunk["suffix"]) for chunk in CHUNKS)
    rows = [{"id": f"r{i}", "text": text, "chunks": CHUNKS} for i in range(5)]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "train.parquet")
    documents = list(sources.read_documents(hub(str(tmp_path / "set")), seed=1))
    assert ids(documents) == [f"r{i}" for i in range(5)]
    assert {document.text for document in documents} == {text}
    assert documents[0].thoughts == ("why one and two", "why three", None)
    whole = replace(hub(str(tmp_path / "set")), shuffle_buffer=None)
    shuffled = list(sources.read_documents(whole, seed=1))
    assert shuffled != documents
    assert sorted(shuffled, key=lambda document: document.doc_id) == documents


def test_a_hub_data_set_that_does_not_exist_is_named(tmp_path: Path) -> None:
    """The error is one line with its name."""
    with pytest.raises(UserError, match=r"Hugging Face data set .*absent"):
        list(sources.read_documents(hub(str(tmp_path / "absent")), seed=1))
