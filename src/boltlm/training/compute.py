"""Compute in floating-point operations (FLOPs), and the record of it that an artifact carries
(docs/method.md, 7.3). All counts are exact integers; no wall clock is involved."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from boltlm.errors import UserError
from boltlm.fingerprint import hash_path
from boltlm.records import write_json

COMPUTE_FILE = "compute.json"  # in models/<name> and in data/latents/<name>


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeRecord:
    """The FLOPs of an artifact's whole history. `key`: that of the artifact itself; `lineage`: the
    FLOPs that it took to make each artifact of the history, by key; `flops_per_token`: of the
    training of the model that the artifact is, or was drawn by."""

    key: str
    flops_per_token: int
    lineage: Mapping[str, int]

    @property
    def own_flops(self) -> int:
        """The FLOPs of the last stage alone."""
        return self.lineage[self.key]

    @property
    def history_flops(self) -> int:
        """The FLOPs of the last stage and of every stage before it, each counted once."""
        return sum(self.lineage.values())


def artifact_key(name: str, folder: Path) -> str:
    """The key of an artifact: its name and a digest of its files."""
    return f"{name}@{hash_path(folder)}"


def write_compute(
    folder: Path,
    name: str,
    *,
    flops: int,
    flops_per_token: int,
    history: Iterable[Mapping[str, int]],
) -> ComputeRecord:
    """Write the record of the artifact `name`, which is complete in `folder` but for it. `flops`:
    its own; `history`: the lineages of what it was made from, which may overlap."""
    path = folder / COMPUTE_FILE
    path.unlink(missing_ok=True)  # of an earlier run: no part of the artifact's digest
    key = artifact_key(name, folder)
    lineage = {key: flops for part in history for key, flops in part.items()} | {key: flops}
    record = ComputeRecord(key=key, flops_per_token=flops_per_token, lineage=lineage)
    totals = {"own_flops": record.own_flops, "history_flops": record.history_flops}
    facts = {"key": key, "flops_per_token": flops_per_token, "lineage": lineage}
    write_json(path, {**facts, **totals})
    return record


def read_compute(folder: Path) -> ComputeRecord:
    """The record that `write_compute` wrote. Raises UserError where there is none."""
    path = folder / COMPUTE_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; run the stage that makes {folder} (dvc repro)")
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return ComputeRecord(
        key=facts["key"], flops_per_token=facts["flops_per_token"], lineage=facts["lineage"]
    )


def training_flops_per_token(model: PreTrainedModel, sequence_length: int) -> int:
    """Floating-point operations of a training step for each token, eq. (14): six for each weight
    that takes part in a matrix product, and those of causal attention, which covers half of the
    sequence on average. What activation checkpointing recomputes is not counted."""
    config = model.config
    embedding: Any = model.get_input_embeddings()
    tied = embedding.weight is getattr(model.get_output_embeddings(), "weight", None)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    matmul_weights = num_weights - (0 if tied else embedding.weight.numel())
    attention = 6 * config.num_hidden_layers * config.hidden_size * sequence_length
    return 6 * matmul_weights + attention
