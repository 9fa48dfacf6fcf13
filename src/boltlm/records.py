"""One record type for each table that one stage writes and another reads, with its Arrow schema.

A table is a folder of Parquet files, one a shard, named `00000.parquet`, `00001.parquet`, …
A shard is a fixed run of documents. Shards of the same name hold the same documents in every table
that is made from a corpus, so that each can be processed without the others.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from boltlm.errors import UserError
from boltlm.parquet_files import read_columns, read_schema, require_columns
from boltlm.shard_store import atomic_write

_TOKENS = pa.list_(pa.int32())
_TEXTS = pa.list_(pa.string())

SampleSource = Literal["proposal", "prior", "previous", "retained", "particle"]


class Record(Protocol):
    schema: ClassVar[pa.Schema]


_R = TypeVar("_R", bound=Record)


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text X. `latent`: one latent for the document; `thoughts`: one for each sentence (empty: it
    needs no thought; None: it has none); a source may have either or neither. `cluster` names what
    makes documents and questions dependent, such as the problem, book or site behind them; None:
    the document is independent of all others. `log_prob`: log p of the text in nats under the
    distribution that it was drawn from, where that is known. `pieces`: the lengths in characters of
    the pieces in which the source lists the text; `thoughts` then has one entry for each piece."""

    schema: ClassVar[pa.Schema] = pa.schema(
        {
            "doc_id": pa.string(),
            "text": pa.string(),
            "source": pa.string(),
            "cluster": pa.string(),
            "latent": pa.string(),
            "thoughts": _TEXTS,
            "log_prob": pa.float64(),
            "pieces": pa.list_(pa.int32()),
        }
    )
    doc_id: str
    text: str
    source: str
    cluster: str | None = None
    latent: str | None = None
    thoughts: tuple[str | None, ...] | None = None
    log_prob: float | None = None
    pieces: tuple[int, ...] | None = None


# Columns that a table has only where a record has a value for them.
_OPTIONAL: Mapping[type[Any], tuple[str, ...]] = {Document: ("pieces",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A held-out question: the document up to its final claim, the sentence "<stem> <answer>.".
    `subject`: the group of questions that it belongs to; `cluster` as in `Document`."""

    schema: ClassVar[pa.Schema] = pa.schema(
        {
            "question_id": pa.string(),
            "subject": pa.string(),
            "prompt": pa.string(),
            "stem": pa.string(),
            "answer": pa.string(),
            "cluster": pa.string(),
            "latent": pa.string(),
        }
    )
    question_id: str
    subject: str
    prompt: str
    stem: str
    answer: str
    cluster: str | None = None
    latent: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A chunk X_n: a run of the text of a document. Chunks are stored in reading order."""

    schema: ClassVar[pa.Schema] = pa.schema(
        {"doc_id": pa.string(), "chunk": pa.int32(), "text": pa.string(), "tokens": _TOKENS}
    )
    doc_id: str
    chunk: int
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherLatent:
    """The latent that a teacher wrote for a chunk; where there is none, `reason` says why."""

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
    """A teacher's paraphrase of a document; where there is none, `reason` says why."""

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
    """A latent that was drawn for a chunk: token ids without EoL, log-probabilities in nats
    (docs/method.md, section 4). `finish`: "stop" (EoL was drawn) or "length" (EoL was forced).

    `source` says what it was drawn from: "proposal" (q′), "prior" (p without the barred tokens),
    "previous" (the q′ of the iteration before), "retained" (it was selected then) or "particle" (q′
    with latents in the context); `sample` is its index among those of the same source. `ancestor`:
    the particle of the chunk before whose latents are in its context.
    """

    schema: ClassVar[pa.Schema] = pa.schema(
        {
            "doc_id": pa.string(),
            "chunk": pa.int32(),
            "source": pa.string(),
            "sample": pa.int32(),
            "ancestor": pa.int32(),
            "latent": pa.string(),
            "tokens": _TOKENS,
            "finish": pa.string(),
            "log_q": pa.float64(),
            "log_allowed": pa.float64(),
            "log_p_latent": pa.float64(),
            "log_p_text": pa.float64(),
            "log_weight": pa.float64(),
            "selected": pa.bool_(),
        }
    )
    doc_id: str
    chunk: int
    source: SampleSource = "proposal"
    sample: int
    ancestor: int | None = None
    latent: str
    tokens: tuple[int, ...]
    finish: str
    log_q: float
    log_allowed: float
    log_p_latent: float
    log_p_text: float
    log_weight: float
    selected: bool


def shard_name(index: int) -> str:
    return f"{index:05d}.parquet"


def write_shard(path: Path, kind: type[_R], records: Iterable[_R]) -> None:
    """Write one shard completely or not at all."""
    rows = list(records)
    table = pa.table(
        {
            field.name: pa.array([getattr(row, field.name) for row in rows], type=field.type)
            for field in kind.schema
        },
        schema=kind.schema,
    )
    for name in _OPTIONAL.get(kind, ()):
        if table.column(name).null_count == len(rows):
            table = table.drop_columns(name)
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a table in order. Raises UserError where there are none, or one is missing
    before others."""
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise UserError(f"{folder}: no *.parquet in it; run the stage that makes it (dvc repro)")
    numbers = [int(path.stem) for path in paths if re.fullmatch(r"\d{5}", path.stem)]
    if lost := [n for n in range(max(numbers, default=-1)) if n not in set(numbers)]:
        raise UserError(f"{folder}: {shard_name(lost[0])} is missing; run dvc checkout or repro")
    return paths


def read_shard(path: Path, kind: type[_R]) -> list[_R]:
    """The records of one shard. Raises UserError where a column is missing or of another type."""
    _check(path, kind)
    present = set(read_schema(path).names)
    all_names = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    names = [name for name in all_names if name in present]
    columns = read_columns(path, names).to_pydict()
    lists = {field.name for field in kind.schema if pa.types.is_list(field.type)}
    for name in lists.intersection(names):
        columns[name] = [None if value is None else tuple(value) for value in columns[name]]
    rows = zip(*(columns[name] for name in names), strict=True)
    return [kind(**dict(zip(names, row, strict=True))) for row in rows]


def _check(path: Path, kind: type[_R]) -> None:
    require_columns(path, kind.schema, _OPTIONAL.get(kind, ()))


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Columns of one shard as arrays. The ids of row i are `tokens[offsets[i] : offsets[i + 1]]`;
    `valid[i]` tells a row whose ids are null from one whose list of ids is empty."""

    doc_ids: list[str]
    chunks: list[int]
    tokens: np.ndarray
    offsets: np.ndarray
    valid: np.ndarray

    def ids(self, row: int) -> np.ndarray:
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]


def read_tokens(path: Path, kind: type[_R], *, only: str | None = None) -> TokenTable:
    """doc_id, chunk and token ids of one shard, without a Python object for each id. `only`: a
    column that must be true in the rows to read. Raises UserError as `read_shard` does."""
    _check(path, kind)
    columns = ["doc_id", "chunk", "tokens", *([only] if only else [])]
    table = read_columns(path, columns)
    if only:
        table = table.filter(table.column(only))
    tokens = table.column("tokens").combine_chunks()
    tokens = tokens.chunk(0) if isinstance(tokens, pa.ChunkedArray) else tokens
    return TokenTable(
        table.column("doc_id").to_pylist(),
        table.column("chunk").to_pylist(),
        tokens.values.to_numpy(zero_copy_only=False),
        tokens.offsets.to_numpy(),
        tokens.is_valid().to_numpy(zero_copy_only=False),
    )


def read_column(path: Path, kind: type[_R], name: str) -> np.ndarray:
    """A column of one shard, in the order of its rows. Raises UserError as `read_shard`
    does."""
    _check(path, kind)
    return read_columns(path, [name]).column(name).to_numpy()


def read_table(folder: Path, kind: type[_R]) -> Iterator[_R]:
    """All records of a table in order; one shard is in memory at a time."""
    for path in shard_paths(folder):
        yield from read_shard(path, kind)


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write facts as JSON with sorted keys, completely or not at all; NaN becomes null."""
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in facts.items()
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(clean, indent=2, sort_keys=True) + "\n", encoding="utf-8")
