"""Sources: the same documents from every kind of file, in an order that no file order changes."""

import gzip
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from boltlm.corpus import sources
from boltlm.corpus.sources import GSM8K, Columns, Files, Hub, Pieces
from boltlm.errors import UserError
from boltlm.records import Document
from tests import tiny

COLUMNS = Columns(text="body", doc_id="key", latent="thought", pieces=None)
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


def files(
    path: Path | str, columns: Columns = COLUMNS, shuffle_buffer: int = 0, seed: int = 1
) -> list[Document]:
    config = Files(kind="files", path=str(path), columns=columns, shuffle_buffer=shuffle_buffer)
    return list(sources.documents(config, seed))


def ids(found: list[Document]) -> list[str]:
    return [document.doc_id for document in found]


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "rows.jsonl": write_jsonl,
    "rows.jsonl.gz": write_gzip,
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_every_kind_give_the_same_documents(tmp_path: Path, name: str) -> None:
    """The format on disk is not part of the experiment; text passes byte for byte."""
    found = files(WRITERS[name](tmp_path / name, ROWS))
    assert found == [
        Document(doc_id=row["key"], text=row["body"], source=name, latent=row["thought"])
        for row in ROWS
    ]


def test_columns_may_be_absent(tmp_path: Path) -> None:
    """Without an id column a document is named after its file and place, without latent: None."""
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    found = files(path, Columns(text="body", doc_id=None, latent=None, pieces=None))
    assert ids(found) == ["a.jsonl:0", "a.jsonl:1"]
    assert [document.latent for document in found] == [None, None]


def test_a_pattern_takes_every_file_in_order(tmp_path: Path) -> None:
    """A corpus in several files is one corpus, whatever order the disk lists them in."""
    for part in (2, 0, 1):
        write_jsonl(tmp_path / f"part{part}.jsonl", ROWS[part * 10 : part * 10 + 10])
    assert ids(files(tmp_path / "part*.jsonl")) == [f"k{i}" for i in range(30)]


def test_files_of_one_name_in_two_folders_stay_apart(tmp_path: Path) -> None:
    """Every later stage joins by doc_id: two documents of one id would be merged."""
    columns = Columns(text="body", doc_id=None, latent=None, pieces=None)
    for folder in ("algebra", "calculus"):
        write_jsonl(tmp_path / folder / "train.jsonl", ROWS[:3])
    found = files(tmp_path / "*" / "train.jsonl", columns)
    assert len(set(ids(found))) == len(found) == 6


def test_a_large_buffer_shuffles_by_id_alone(tmp_path: Path) -> None:
    """As large as the corpus, it gives one order whatever order the files hold; another seed
    gives another."""
    forward = write_jsonl(tmp_path / "forward.jsonl", ROWS)
    backward = write_parquet(tmp_path / "backward.parquet", ROWS[::-1])
    shuffled = ids(files(forward, shuffle_buffer=len(ROWS)))
    assert sorted(shuffled) == sorted(row["key"] for row in ROWS)
    assert shuffled != [row["key"] for row in ROWS]
    assert ids(files(backward, shuffle_buffer=len(ROWS))) == shuffled
    assert ids(files(forward, shuffle_buffer=1000)) == shuffled
    assert ids(files(forward, shuffle_buffer=len(ROWS), seed=2)) != shuffled


@pytest.mark.parametrize("buffer", [0, 1, 7, 39])
def test_a_small_buffer_loses_nothing(tmp_path: Path, buffer: int) -> None:
    """A document still held when the source ends must come out."""
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert sorted(ids(files(path, shuffle_buffer=buffer))) == sorted(row["key"] for row in ROWS)


def test_a_small_buffer_still_shuffles_late_documents(tmp_path: Path) -> None:
    """Of a long source a buffer must go on shuffling: behind a buffer of B a document waits for
    about B others, and about 1 in B leaves the moment it arrives."""
    rows = [{"body": "x", "key": f"{i:05d}", "thought": ""} for i in range(4000)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    order = [int(key) for key in ids(files(path, shuffle_buffer=50))]
    late = order[2000:3900]
    at_once = sum(key == place + 50 for place, key in enumerate(late, 2000))
    assert at_once / len(late) < 0.1


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("column", ["text", "doc_id", "latent"])
def test_a_wrong_column_is_named(tmp_path: Path, name: str, column: str) -> None:
    """The commonest mistake with a new data set: name the column, the file, and what it has."""
    path = WRITERS[name](tmp_path / name, ROWS)
    names: dict[str, Any] = {
        "text": "body",
        "doc_id": None,
        "latent": None,
        "pieces": None,
        column: "absent",
    }
    with pytest.raises(UserError, match=rf"{name}.*'absent'.*body, key, thought"):
        files(path, Columns(**names))


def test_a_column_that_is_not_text_is_named(tmp_path: Path) -> None:
    """A number or a list would fail later, in the tokenizer."""
    path = write_jsonl(tmp_path / "a.jsonl", [{**ROWS[0], "body": 3}])
    with pytest.raises(UserError, match=r"a\.jsonl.*row 1.*'body'"):
        files(path)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    """Before anything is trained."""
    with pytest.raises(UserError, match=r"nowhere.*no such file"):
        files(tmp_path / "nowhere*.jsonl")
    config = GSM8K(kind="gsm8k", path=str(tmp_path / "nowhere"), split="train", shuffle_buffer=0)
    with pytest.raises(UserError, match="nowhere"):
        list(sources.documents(config, 1))


BROKEN = {
    "text.jsonl": b'{"body": "x"}\nnot json\n',
    "list.jsonl": b'{"body": "x"}\n[1, 2]\n',
    "latin.jsonl": b'{"body": "\xe9"}\n',
    "plain.jsonl.gz": b'{"body": "x"}\n',
    "short.jsonl.gz": gzip.compress(b'{"body": "x"}\n' * 1000)[:-12],
    "damaged.jsonl.gz": gzip.compress(b"")[:10] + b"\x07" + b"\x00" * 20,
    "text.parquet": b'{"body": "x"}\n',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    """A damaged download must say which file it is, not show a traceback."""
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        files(tmp_path / name, Columns(text="body", doc_id=None, latent=None, pieces=None))


def test_a_broken_line_is_numbered(tmp_path: Path) -> None:
    """In a file of millions of lines the number is what helps."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n\n{"body": \n', encoding="utf-8")
    with pytest.raises(UserError, match="line 3"):
        files(path, Columns(text="body", doc_id=None, latent=None, pieces=None))


def gsm8k_row(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": answer}


GSM8K_ROWS = [
    gsm8k_row("How many?", "He has 2*3=<<2*3=6>>6.\nThen 6+1=<<6+1=7>>7.\n#### 7"),
    gsm8k_row("What costs it?", "It costs $1,000.\n#### 1,000"),
]


def gsm8k(tmp_path: Path, rows: list[dict[str, str]]) -> GSM8K:
    path = write_jsonl(tmp_path / "gsm8k.jsonl", rows)
    return GSM8K(kind="gsm8k", path=str(path), split="test", shuffle_buffer=0)


def test_gsm8k_is_question_answer_and_derivation(tmp_path: Path) -> None:
    """The calculator's marks are no thought; the answer is what stands behind ####."""
    config = gsm8k(tmp_path, GSM8K_ROWS)
    first, second = sources.documents(config, 1)
    assert first == Document(
        doc_id="gsm8k-test-00000",
        text="How many?\nThe answer is 7.",
        source="gsm8k",
        latent="He has 2*3=6.\nThen 6+1=7.",
    )
    assert second.text == "What costs it?\nThe answer is 1,000."
    asked = list(sources.questions(config, 1))
    assert [(q.prompt, q.answer) for q in asked] == [
        ("How many?", "7"),
        ("What costs it?", "1,000"),
    ]
    assert asked[0].latent == first.latent


def test_a_gsm8k_row_without_its_mark_is_named(tmp_path: Path) -> None:
    """A derivation taken for an answer would be trained on."""
    with pytest.raises(UserError, match=r"####.*so seven"):
        list(sources.documents(gsm8k(tmp_path, [gsm8k_row("How many?", "so seven")]), 1))
    with pytest.raises(UserError, match="'question' and 'answer'"):
        list(sources.questions(gsm8k(tmp_path, [{"question": "x"}]), 1))


def test_the_real_gsm8k_parses() -> None:
    """Every row of the real file has a derivation free of marks and a short final answer."""
    path = tiny.SHARED / "eval" / "gsm8k_test.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there; GSM8K is not part of the repository")
    config = GSM8K(kind="gsm8k", path=str(path), split="test", shuffle_buffer=0)
    asked = list(sources.questions(config, 1))
    assert len(asked) == 1319
    for question in asked:
        assert question.latent
        assert "<<" not in question.latent
        assert ">>" not in question.latent
        float(question.answer.replace(",", ""))


MAIN: dict[str, Any] = {
    "kind": "files",
    "path": "a.jsonl",
    "columns": {"text": "body", "doc_id": None, "latent": None, "pieces": None},
    "shuffle_buffer": 0,
}


def params(corpus: Mapping[str, Any], **overrides: Mapping[str, Any]) -> dict[str, Any]:
    corpora = {name: {"documents": 1, "source": source} for name, source in overrides.items()}
    return {"seed": 1, "corpus": corpus, "corpora": corpora}


def test_a_corpus_lays_its_keys_over_the_main_source() -> None:
    """Of the same kind, what is not said is as in `corpus`; another kind stands alone."""
    other = {"kind": "gsm8k", "path": None, "split": "train", "shuffle_buffer": 0}
    found = params(MAIN, same={}, moved={"path": "b.jsonl"}, other=other)
    same = sources.source(found, "same")
    columns = Columns(text="body", doc_id=None, latent=None, pieces=None)
    assert same == Files(kind="files", path="a.jsonl", columns=columns, shuffle_buffer=0)
    moved = sources.source(found, "moved")
    assert moved == Files(kind="files", path="b.jsonl", columns=columns, shuffle_buffer=0)
    assert isinstance(sources.source(found, "other"), GSM8K)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"kind": "web"}, r"corpora\.x\.source.*kind.*'web'"),
        ({"kind": "gsm8k"}, r"missing key corpora\.x\.source\.path"),
        ({"pth": "b"}, r"unknown key corpora\.x\.source\.pth"),
        ({"path": 3}, r"corpora\.x\.source\.path must be of type str"),
    ],
)
def test_a_wrong_source_names_its_key(override: dict[str, Any], named: str) -> None:
    """A typing mistake in params.yaml must not fall back to the main source."""
    with pytest.raises(UserError, match=named):
        sources.source(params(MAIN, x=override), "x")


def test_kinds_without_questions_say_so() -> None:
    """Plain files hold no questions; the remedy is in the message."""
    columns = Columns(text="body", doc_id=None, latent=None, pieces=None)
    config = Files(kind="files", path="a.jsonl", columns=columns, shuffle_buffer=0)
    with pytest.raises(UserError, match=r"'files'.*questions\.count"):
        sources.questions(config, 1)
    made = list(itertools.islice(sources.questions(tiny.pages(), 1), 3))
    assert len(made) == 3


CHUNKS = [
    {"suffix": "One is. Two is.", "latent": "why one and two"},
    {"suffix": " Three", "latent": "why three"},
    {"suffix": " is. Four is.", "latent": None},
]


def test_latents_by_piece_go_to_the_sentences_that_begin_in_it(tmp_path: Path) -> None:
    """As the authors' released data have them: a list of chunks, each with its own latent."""
    text = "".join(str(chunk["suffix"]) for chunk in CHUNKS)
    names = Pieces(column="chunks", text="suffix", latent="latent")
    columns = Columns(text="text", doc_id=None, latent=None, pieces=names)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text, "chunks": CHUNKS}) + "\n", encoding="utf-8")
    (document,) = files(path, columns)
    assert document.thoughts == ("why one and two", "why one and two", "why three", "")
    for row in (
        {"text": "Another.", "chunks": CHUNKS},
        {"text": text, "chunks": [{"suffix": "x"}]},
    ):
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"row 1: .*'chunks'"):
            files(path, columns)


def hub(name: str) -> Hub:
    pieces = Pieces(column="chunks", text="suffix", latent="latent")
    columns = Columns(text="text", doc_id="id", latent=None, pieces=pieces)
    return Hub(kind="hub", name=name, config=None, split="train", columns=columns, shuffle_buffer=0)


def test_a_hub_data_set_is_streamed_with_its_latents(tmp_path: Path) -> None:
    """Through the real library, which takes a folder where it takes a name; rows in the form of the
    authors' released data."""
    text = "".join(str(chunk["suffix"]) for chunk in CHUNKS)
    rows = [{"id": f"r{i}", "text": text, "chunks": CHUNKS} for i in range(5)]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "train.parquet")
    found = list(sources.documents(hub(str(tmp_path / "set")), seed=1))
    assert [document.doc_id for document in found] == [f"r{i}" for i in range(5)]
    assert {document.text for document in found} == {text}
    assert found[0].thoughts == ("why one and two", "why one and two", "why three", "")


def test_a_hub_data_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    """One line that says which."""
    with pytest.raises(UserError, match=r"Hugging Face data set .*absent"):
        list(sources.documents(hub(str(tmp_path / "absent")), seed=1))
