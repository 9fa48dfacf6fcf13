"""Helpers of the training tests: a small training run, a plain loop to compare it with, and the
stage `train` as a process.

Shape suffixes: B sequences, L positions, V vocabulary.
"""

import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedModel

from boltlm.params import load
from boltlm.records import Chunk, write_shard
from boltlm.sequences.packing import IGNORE_INDEX, PackedDataset
from boltlm.training.checkpointing import CheckpointManager
from boltlm.training.config import TrainConfig
from boltlm.training.schedules import learning_rate
from boltlm.training.trainer import TrainResult, train_model
from tests import tiny

VOCAB_SIZE, SEQUENCE_LENGTH, SEED = 30, 12, 4
NUM_STEPS, NUM_TARGETS = 6, 199  # of `make_dataset` in batches of three sequences
Batch = tuple[np.ndarray, ...]


def make_dataset() -> PackedDataset:
    """17 sequences, the last of which is padded; the last batch is smaller than the others."""
    stream = np.random.default_rng(1).integers(0, VOCAB_SIZE, NUM_TARGETS + 1).astype(np.int32)
    stream[1::2] = (stream[0::2] + 1) % VOCAB_SIZE  # something to learn
    return tiny.rows(stream, SEQUENCE_LENGTH, SEED)


def make_model() -> LlamaForCausalLM:
    return tiny.llama(2, vocab_size=VOCAB_SIZE, hidden_size=16)


def train(
    config: TrainConfig,
    csv_path: Path | None,
    work: Path | None = None,
    *,
    model: PreTrainedModel | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, TrainResult]:
    """Train on `make_dataset()` and leave the checkpoints in `work`/run, by default a new folder.
    `options` are passed on to `train_model`."""
    model = model or make_model()
    folder = (work or Path(tempfile.mkdtemp())) / "run"
    result = train_model(
        model,
        make_dataset(),
        config,
        seed=SEED,
        csv_path=csv_path,
        what="tests",
        checkpoints=CheckpointManager(folder, config.checkpoint_every, "tests"),
        **options,
    )
    return model, result


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a training log, without their empty cells."""
    with path.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return [{name: float(text) for name, text in line.items() if text} for line in lines]


def column(log: Sequence[dict[str, float]], name: str) -> list[float]:
    return [line[name] for line in log]


def same_weights(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(weight, other_weight) for weight, other_weight in pairs)


def plain_loop(
    config: TrainConfig,
    steps: int | None = None,
    *,
    model: PreTrainedModel | None = None,
    batches: Sequence[Batch] | None = None,
    rates: Sequence[float] | None = None,
) -> tuple[PreTrainedModel, list[float], list[float]]:
    """Model, losses and gradient norms of the first `steps` steps of a textbook training loop."""
    model, dataset = (model or make_model()).train(), make_dataset()
    num_steps = -(-len(dataset) // config.batch_size)
    batches = batches or [dataset.batch(step, config.batch_size) for step in range(num_steps)]
    rates = rates or [
        learning_rate(config.schedule, config.learning_rate, step, num_steps)
        for step in range(num_steps)
    ]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    losses: list[float] = []
    norms: list[float] = []
    for (inputs_BL, labels), lr in list(zip(batches, rates, strict=True))[:steps]:
        optimizer.param_groups[0]["lr"] = lr
        logits_BLV = model(torch.from_numpy(inputs_BL)).logits
        labels_BL = torch.from_numpy(labels)
        has_target_BL = labels_BL != IGNORE_INDEX
        loss = cross_entropy(logits_BLV[has_target_BL], labels_BL[has_target_BL])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return model, losses, norms


def write_random_chunks(folder: Path, *, documents: int, tokens: int, max_id: int) -> Path:
    """A corpus of one shard: documents of one chunk with random ids below `max_id`."""
    random = np.random.default_rng(1)
    chunks = [
        Chunk(doc_id=f"d{index}", chunk=0, text="x", tokens=tuple(ids.tolist()))
        for index in range(documents)
        for ids in [random.integers(2, max_id, tokens)]
    ]
    write_shard(folder / "00000.parquet", Chunk, chunks)
    return folder


def raw_run_params(budget: dict[str, Any], sequence_length: int, **train: Any) -> dict[str, Any]:
    """params.yaml with a single model `arm`, trained on raw documents. `train`: changes to the
    section of that name."""
    params = tiny.without_entries(load(tiny.ROOT / "params.yaml"))
    params["train"] |= train
    params["sequences"] |= {"sequence_length": sequence_length, "layout": "document"}
    params["models"] = {"arm": {**tiny.raw_entry("em"), "train": {}, "budget": budget}}
    return params


class TrainStage:
    """The script of the stage `train` with its input, in a folder. Each run of the stage has a
    name: its model is in the folder `<name>`, its log is `<name>.csv`."""

    def __init__(self, folder: Path, base: Path, chunks: Path, params: dict[str, Any]) -> None:
        self.folder, self.base, self.chunks = folder, base, chunks
        (folder / "params.yaml").write_text(yaml.safe_dump(params))

    def start(
        self, name: str, launcher: Sequence[str] = (), *, work: str | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a run as a process. `work`: the name of its folder of unfinished work."""
        command = [sys.executable, *launcher, str(tiny.ROOT / "stages" / "train.py")]
        for flag, value in {
            "params": self.folder / "params.yaml",
            "name": "arm",
            "parent": self.base,
            "chunks": self.chunks,
            "data": self.folder / "missing",
            "mixed": self.chunks,
            "heldout": self.chunks,
            "work": self.folder / (work or f"{name}-work"),
            "timings": self.folder / f"{name}-timings",
            "out": self.folder / name,
            "csv": self.folder / f"{name}.csv",
            "metrics": self.folder / f"{name}.json",
            "snapshots": self.folder / f"{name}-snapshots",
            "db": self.folder / "mlflow.db",
            "artifacts": self.folder / "artifacts",
        }.items():
            command += [f"--{flag}", str(value)]
        env = {**os.environ, "PYTHONPATH": str(tiny.ROOT / "src"), "OMP_NUM_THREADS": "1"}
        env.pop("DVC_ROOT", None)
        return subprocess.Popen(command, env=env)

    def run(
        self, name: str, launcher: Sequence[str] = (), *, work: str | None = None
    ) -> list[dict[str, float]]:
        """Run to the end; returns the log. Raises CalledProcessError where the stage fails."""
        process = self.start(name, launcher, work=work)
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)
        return read_log(self.folder / f"{name}.csv")
