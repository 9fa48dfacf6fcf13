"""One record type for each table that crosses a stage, with its Arrow schema (SPEC section 10).

A table is a folder of Parquet files, one a shard, named `00000.parquet`, `00001.parquet`, …
A shard is a fixed run of documents; the same number names the same documents in every table
made from a corpus, so a shard can be worked on without looking at another.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from boltlm.errors import UserError

_TOKENS = pa.list_(pa.int32())
_TEXTS = pa.list_(pa.string())


class Record(Protocol):
    schema: ClassVar[pa.Schema]


R = TypeVar("R", bound=Record)


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text X. `latent`: thoughts behind the whole; `thoughts`: one a sentence; or neither."""

    schema: ClassVar[pa.Schema] = pa.schema(
        {
            "doc_id": pa.string(),
            "text": pa.string(),
            "source": pa.string(),
            "latent": pa.string(),
            "thoughts": _TEXTS,
        }
    )
    doc_id: str
    text: str
    source: str
    latent: str | None = None
    thoughts: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A held-out question: the page's text up to the claim, and the claim's final answer."""

    schema: ClassVar[pa.Schema] = pa.schema(
        {
            "question_id": pa.string(),
            "prompt": pa.string(),
            "answer": pa.string(),
            "latent": pa.string(),
        }
    )
    question_id: str
    prompt: str
    answer: str
    latent: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A run X_n of whole sentences; chunks of a document follow each other in reading order."""

    schema: ClassVar[pa.Schema] = pa.schema(
        {"doc_id": pa.string(), "chunk": pa.int32(), "text": pa.string(), "tokens": _TOKENS}
    )
    doc_id: str
    chunk: int
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherLatent:
    """What a teacher says about a chunk. `reason` is null, or says why there is no latent."""

    schema: ClassVar[pa.Schema] = pa.schema(
        {
            "doc_id": pa.string(),
            "chunk": pa.int32(),
            "latent": pa.string(),
            "tokens": _TOKENS,
            "reason": pa.string(),
        }
    )
    doc_id: str
    chunk: int
    latent: str | None
    tokens: tuple[int, ...] | None
    reason: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Paraphrase:
    """A document retold by a teacher. `reason` is null, or says why there is no text."""

    schema: ClassVar[pa.Schema] = pa.schema(
        {
            "doc_id": pa.string(),
            "paraphrase": pa.int32(),
            "style": pa.string(),
            "text": pa.string(),
            "reason": pa.string(),
        }
    )
    doc_id: str
    paraphrase: int
    style: str
    text: str | None
    reason: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One of the K latents drawn for a chunk; `tokens` without EoL, log-probabilities in nats."""

    schema: ClassVar[pa.Schema] = pa.schema(
        {
            "doc_id": pa.string(),
            "chunk": pa.int32(),
            "sample": pa.int32(),
            "latent": pa.string(),
            "tokens": _TOKENS,
            "finish": pa.string(),
            "log_q": pa.float64(),
            "log_p_latent": pa.float64(),
            "log_p_text": pa.float64(),
            "log_weight": pa.float64(),
            "selected": pa.bool_(),
        }
    )
    doc_id: str
    chunk: int
    sample: int
    latent: str
    tokens: tuple[int, ...]
    finish: str
    log_q: float
    log_p_latent: float
    log_p_text: float
    log_weight: float
    selected: bool


def shard_name(index: int) -> str:
    return f"{index:05d}.parquet"


def write_shard(path: Path, kind: type[R], records: Iterable[R]) -> None:
    """Write one shard whole or not at all: to a neighbour first, flushed, then renamed."""
    rows = list(records)
    table = pa.table(
        {
            field.name: pa.array([getattr(row, field.name) for row in rows], type=field.type)
            for field in kind.schema
        },
        schema=kind.schema,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def shards(folder: Path) -> list[Path]:
    """The shards of a table in order. Raises UserError where there is none."""
    found = sorted(folder.glob("*.parquet"))
    if not found:
        raise UserError(f"{folder}: no *.parquet in it; run the stage that makes it (dvc repro)")
    return found


def read_shard(path: Path, kind: type[R]) -> list[R]:
    """The records of one shard. Raises UserError where a column is missing or of another type."""
    wanted = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    schema = pq.read_schema(path)
    for field in kind.schema:
        if field.name not in schema.names or schema.field(field.name).type != field.type:
            raise UserError(f"{path}: column '{field.name}' ({field.type}) is missing or differs")
    columns = pq.read_table(path, columns=wanted).to_pydict()
    lists = {field.name for field in kind.schema if pa.types.is_list(field.type)}
    for name in lists:
        columns[name] = [None if value is None else tuple(value) for value in columns[name]]
    rows = zip(*(columns[name] for name in wanted), strict=True)
    return [kind(**dict(zip(wanted, row, strict=True))) for row in rows]


def read(folder: Path, kind: type[R]) -> Iterator[R]:
    """All records of a table in order, a shard in memory at a time."""
    for path in shards(folder):
        yield from read_shard(path, kind)


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write facts as JSON with sorted keys, whole or not at all; NaN and infinities as null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in facts.items()
    }
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(clean, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
