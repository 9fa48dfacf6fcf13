"""Which documents the latent browser shows, and their rows in tables of any size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from boltlm.errors import UserError
from boltlm.records import Chunk, Sample, read_column, shard_paths

SAMPLED_SHARDS = 8  # documents are sampled from at most so many shards, which bounds what is read

Shards = Mapping[str, Sequence[str]]  # the ids of documents by the name of their shard
Row = Mapping[str, Any]  # a row of a table


@dataclass(frozen=True, slots=True)
class DataFolders:
    """The folders `data` and `models` of an experiment."""

    data: Path
    models: Path

    def latents(self, entry: str) -> Path:
        return self.data / "latents" / entry

    def chunks(self, corpus: str) -> Path:
        return self.data / "chunks" / corpus


def sampled_documents(chunks: Path, count: int, random: np.random.Generator) -> Shards:
    """`count` documents of a corpus, spread evenly over SAMPLED_SHARDS of its shards."""
    paths = shard_paths(chunks)
    chosen = sorted(random.permutation(len(paths))[:SAMPLED_SHARDS].tolist())
    shards: dict[str, list[str]] = {}
    for position, index in enumerate(chosen):
        doc_ids = list(dict.fromkeys(read_column(paths[index], Chunk, "doc_id").tolist()))
        quota = (count + len(chosen) - 1 - position) // len(chosen)
        if quota:
            rows = random.permutation(len(doc_ids))[:quota]
            shards[paths[index].name] = [doc_ids[row] for row in sorted(rows.tolist())]
    return shards


def named_documents(chunks: Path, doc_ids: Sequence[str]) -> Shards:
    """The shards of these documents. Raises UserError where the corpus lacks one of them."""
    shards: dict[str, list[str]] = {}
    missing = dict.fromkeys(doc_ids)
    example = ""
    for path in shard_paths(chunks):
        present = dict.fromkeys(read_column(path, Chunk, "doc_id").tolist())
        example = example or next(iter(present), "")
        if wanted := [doc_id for doc_id in missing if doc_id in present]:
            shards[path.name] = wanted
            missing = {doc_id: None for doc_id in missing if doc_id not in present}
    if missing:
        raise UserError(
            f"{chunks}: no document '{next(iter(missing))}' in it; give the id of one that is, such"
            f" as '{example}'"
        )
    return shards


def document_rows(folder: Path, kind: type[Chunk] | type[Sample], shards: Shards) -> list[Row]:
    """The rows of these documents in a table; others become no Python objects. Raises UserError
    where a shard is missing or has other columns."""
    rows: list[Row] = []
    for shard, doc_ids in shards.items():
        path = folder / shard
        if not path.is_file():
            raise UserError(f"{path}: no such file; run the stage that makes it (dvc repro)")
        read_column(path, kind, "doc_id")  # checks the columns
        columns = [field.name for field in kind.schema]
        condition = pc.field("doc_id").isin(list(doc_ids))
        rows += pq.read_table(path, columns=columns, filters=condition).to_pylist()
    return rows
