"""Tables: what is written is read back, and a file is whole or not there."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.errors import UserError
from boltlm.records import (
    Chunk,
    Document,
    Question,
    Sample,
    TeacherLatent,
    read_shard,
    read_table,
    shard_name,
    shard_paths,
    write_json,
    write_shard,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
INT32 = st.integers(-(2**31), 2**31 - 1)
TOKENS = st.lists(INT32, max_size=6).map(tuple)
NATS = st.floats(allow_nan=False)
ROWS: dict[Any, st.SearchStrategy[Any]] = {
    Document: st.builds(
        Document,
        doc_id=TEXT,
        text=TEXT,
        source=TEXT,
        latent=TEXT | st.none(),
        thoughts=st.lists(TEXT, max_size=3).map(tuple) | st.none(),
    ),
    Question: st.builds(
        Question,
        question_id=TEXT,
        prompt=TEXT,
        stem=TEXT,
        answer=TEXT,
        cluster=TEXT | st.none(),
        latent=TEXT | st.none(),
    ),
    Chunk: st.builds(Chunk, doc_id=TEXT, chunk=INT32, text=TEXT, tokens=TOKENS),
    TeacherLatent: st.builds(
        TeacherLatent,
        doc_id=TEXT,
        chunk=INT32,
        latent=TEXT | st.none(),
        tokens=TOKENS | st.none(),
        reason=TEXT | st.none(),
    ),
    Sample: st.builds(
        Sample,
        doc_id=TEXT,
        chunk=INT32,
        sample=INT32,
        latent=TEXT,
        tokens=TOKENS,
        finish=TEXT,
        log_q=NATS,
        log_allowed=NATS,
        log_p_latent=NATS,
        log_p_text=NATS,
        log_weight=NATS,
        selected=st.booleans(),
    ),
}


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_records_come_back(
    kind: Any, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """None, empty lists, infinities, NUL and every script must survive the disk: byte for byte."""
    rows = data.draw(st.lists(ROWS[kind], max_size=4))
    path = tmp_path_factory.getbasetemp() / "records" / f"{kind.__name__}.parquet"
    write_shard(path, kind, rows)
    assert read_shard(path, kind) == rows


def test_nan_comes_back_as_nan(tmp_path: Path) -> None:
    """An unknown log-probability is NaN, which is not None and not 0."""
    row = Sample(
        doc_id="d", chunk=0, sample=0, latent="", tokens=(), finish="length", log_q=-1.0,
        log_allowed=math.nan, log_p_latent=-2.0, log_p_text=-3.0, log_weight=-4.0, selected=False,
    )  # fmt: skip
    write_shard(tmp_path / "a.parquet", Sample, [row])
    (back,) = read_shard(tmp_path / "a.parquet", Sample)
    assert math.isnan(back.log_allowed)
    assert back.log_weight == -4.0


def chunk(index: int) -> Chunk:
    return Chunk(doc_id="d", chunk=index, text="x", tokens=(index,))


def test_a_table_is_read_in_the_order_of_its_shards(tmp_path: Path) -> None:
    """00010 comes behind 00009, and what is no shard is not read."""
    for index in reversed(range(11)):
        write_shard(tmp_path / shard_name(index), Chunk, [chunk(index)])
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    assert [row.chunk for row in read_table(tmp_path, Chunk)] == list(range(11))
    assert [path.name for path in shard_paths(tmp_path)][-1] == "00010.parquet"


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    """Training on a table of nothing starts here."""
    with pytest.raises(UserError, match=rf"{tmp_path}: no \*\.parquet"):
        shard_paths(tmp_path)


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"doc_id": pa.array(["d"]), "chunk": pa.array([0], pa.int32())}, "text"),
        (
            {
                "doc_id": pa.array(["d"]),
                "chunk": pa.array([0], pa.int64()),
                "text": pa.array(["x"]),
                "tokens": pa.array([[1]], pa.list_(pa.int32())),
            },
            "chunk",
        ),
    ],
)
def test_a_missing_or_other_column_is_named(
    tmp_path: Path, columns: dict[str, pa.Array], named: str
) -> None:
    """A table of an older version must say which column, not fail in a constructor."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(UserError, match=rf"a\.parquet: column '{named}'"):
        read_shard(path, Chunk)


def test_columns_that_are_not_asked_for_are_ignored(tmp_path: Path) -> None:
    """A table may grow columns without breaking its readers."""
    table = pa.table(
        {
            "more": pa.array([1]),
            "doc_id": pa.array(["d"]),
            "chunk": pa.array([3], pa.int32()),
            "text": pa.array(["x"]),
            "tokens": pa.array([[3]], pa.list_(pa.int32())),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_shard(tmp_path / "a.parquet", Chunk) == [chunk(3)]


def broken() -> Iterator[Chunk]:
    yield chunk(0)
    raise RuntimeError("source died")


def test_a_shard_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the records, the encoding or the disk fail: no part is left, and an older shard
    stays as it was."""
    path = tmp_path / "a.parquet"

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    wrong = Chunk(doc_id="d", chunk=0, text="x", tokens=(2**40,))
    for attempt in ("fresh", "again"):
        with pytest.raises(RuntimeError, match="source died"):
            write_shard(path, Chunk, broken())
        with pytest.raises((pa.ArrowInvalid, OverflowError)):
            write_shard(path, Chunk, [wrong])
        with monkeypatch.context() as patch:
            patch.setattr(pq, "write_table", full)
            with pytest.raises(OSError, match="no space"):
                write_shard(path, Chunk, [chunk(1)])
        left = [entry.name for entry in tmp_path.iterdir()]
        assert left == ([] if attempt == "fresh" else ["a.parquet"])
        write_shard(path, Chunk, [chunk(7)])
        assert read_shard(path, Chunk) == [chunk(7)]


def test_a_folder_is_made_for_a_shard(tmp_path: Path) -> None:
    """DVC deletes outputs, folders included, before a stage runs."""
    write_shard(tmp_path / "a" / "b" / "c.parquet", Chunk, [])
    assert read_shard(tmp_path / "a" / "b" / "c.parquet", Chunk) == []


def test_json_is_sorted_and_strict(tmp_path: Path) -> None:
    """Metrics files are compared as text by git, and read by DVC, which knows no NaN."""
    path = tmp_path / "metrics" / "a.json"
    write_json(path, {"b": 1.5, "a": math.nan, "c": -math.inf, "d": "x", "e": 0})
    text = path.read_text("utf-8")
    wanted = {"a": None, "b": 1.5, "c": None, "d": "x", "e": 0}
    assert list(json.loads(text).items()) == list(wanted.items())
    assert "NaN" not in text
    assert text.endswith("}\n")


def test_json_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts that are no JSON, or a full disk, leave neither half a metrics file nor a part."""
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    written = Path.write_text

    def full(self: Path, *_: Any, **__: Any) -> int:
        written(self, "{", encoding="utf-8")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space"):
            write_json(path, {"a": 2})
    assert json.loads(path.read_text("utf-8")) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
