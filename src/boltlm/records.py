"""One record type for each table that crosses a stage, with its Arrow schema (SPEC section 10).

A table is a folder of Parquet files, one a shard, named `00000.parquet`, `00001.parquet`, …
A shard is a fixed run of documents; the same number names the same documents in every table
made from a corpus, so a shard can be worked on without looking at another.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from boltlm import engine
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
    """Write one shard whole or not at all."""
    rows = list(records)
    table = pa.table(
        {
            field.name: pa.array([getattr(row, field.name) for row in rows], type=field.type)
            for field in kind.schema
        },
        schema=kind.schema,
    )
    with engine.whole(path) as part:
        pq.write_table(table, part, compression="zstd")


def shards(folder: Path) -> list[Path]:
    """The shards of a table in order. Raises UserError where there is none."""
    found = sorted(folder.glob("*.parquet"))
    if not found:
        raise UserError(f"{folder}: no *.parquet in it; run the stage that makes it (dvc repro)")
    return found


def read_shard(path: Path, kind: type[R]) -> list[R]:
    """The records of one shard. Raises UserError where a column is missing or of another type."""
    wanted = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    _check(path, kind)
    columns = pq.read_table(path, columns=wanted).to_pydict()
    lists = {field.name for field in kind.schema if pa.types.is_list(field.type)}
    for name in lists:
        columns[name] = [None if value is None else tuple(value) for value in columns[name]]
    rows = zip(*(columns[name] for name in wanted), strict=True)
    return [kind(**dict(zip(wanted, row, strict=True))) for row in rows]


def _check(path: Path, kind: type[R]) -> None:
    schema = pq.read_schema(path)
    for field in kind.schema:
        if field.name not in schema.names or schema.field(field.name).type != field.type:
            raise UserError(f"{path}: column '{field.name}' ({field.type}) is missing or differs")


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Columns of one shard as arrays: the ids of row i are `tokens[offsets[i] : offsets[i + 1]]`,
    none where it has none (`valid` tells it from an empty list)."""

    doc_ids: list[str]
    chunks: list[int]
    tokens: np.ndarray
    offsets: np.ndarray
    valid: np.ndarray

    def ids(self, row: int) -> np.ndarray:
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]


def read_tokens(path: Path, kind: type[R], *, only: str | None = None) -> TokenTable:
    """doc_id, chunk and token ids of one shard, without a Python object for each id; of the rows
    whose column `only` is true where one is named. Raises UserError as `read_shard` does."""
    _check(path, kind)
    columns = ["doc_id", "chunk", "tokens", *([only] if only else [])]
    table = pq.read_table(path, columns=columns)
    if only:
        table = table.filter(table.column(only))
    found = table.column("tokens").combine_chunks()
    found = found.chunk(0) if isinstance(found, pa.ChunkedArray) else found
    return TokenTable(
        table.column("doc_id").to_pylist(),
        table.column("chunk").to_pylist(),
        found.values.to_numpy(zero_copy_only=False),
        found.offsets.to_numpy(),
        found.is_valid().to_numpy(zero_copy_only=False),
    )


def read(folder: Path, kind: type[R]) -> Iterator[R]:
    """All records of a table in order, a shard in memory at a time."""
    for path in shards(folder):
        yield from read_shard(path, kind)


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write facts as JSON with sorted keys, whole or not at all; NaN and infinities as null."""
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in facts.items()
    }
    with engine.whole(path) as part:
        part.write_text(json.dumps(clean, indent=2, sort_keys=True) + "\n", encoding="utf-8")
