"""Packs, trains and publishes: what the stages `base` and `train` have in common."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from boltlm import checkpoint
from boltlm.sequences.packing import PackedDataset, open_packed, packing_stats
from boltlm.shard_store import exclusive_lock
from boltlm.training import checkpointing, distributed
from boltlm.training.checkpointing import PREDECAY_FILE, CheckpointManager
from boltlm.training.compute import training_flops_per_token
from boltlm.training.config import SnapshotConfig, TrainConfig
from boltlm.training.continual import OPTIMIZER_FILE, RAW_TOKENS_KEY, ContinualState
from boltlm.training.loss import model_weights
from boltlm.training.metrics_logger import LineLogger
from boltlm.training.snapshots import SnapshotWriter
from boltlm.training.trainer import TrainResult, ValidationHook, train_model

FINAL_FOLDER, PREDECAY_FOLDER = "final", "predecay"  # of a model of the schedule `wsd`
SNAPSHOT_FOLDER = "snapshots"  # of unfinished work
PackingStats = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingJob:
    """A training run with its inputs prepared, as `train_and_publish` executes it.

    `work`: the folder of its packed sequences and checkpoints, named by all that they depend on;
    `tokenizer`: the folder whose tokenizer is published with the model; `out`, `csv`, `timing`: as
    in TrainPaths; `facts`: recorded with the model, besides the counts of its sequences;
    `publish_predecay`: whether the state before the decay is published too; `snapshots`: None
    keeps no snapshots; `snapshots_out`: their output folder, None for a run that has none.
    """

    what: str
    config: TrainConfig
    seed: int
    sequence_length: int
    work: Path
    tokenizer: Path
    out: Path
    csv: Path
    timing: Path
    facts: Mapping[str, Any]
    publish_predecay: bool
    continual: ContinualState | None = None
    snapshots: SnapshotConfig | None = None
    snapshots_out: Path | None = None


def train_and_publish(
    job: TrainingJob,
    *,
    pack: Callable[[Path], object],
    load_model: Callable[[], PreTrainedModel],
    record_compute: Callable[[int, PackingStats], None] | None = None,
    validation_hook: ValidationHook | None = None,
    line_logger: LineLogger | None = None,
) -> None:
    """Pack the training sequences, train, write the model to its output folder, and then remove
    the unfinished work.

    `pack` writes the sequences into the folder of unfinished work, in the main process;
    `load_model` returns the model to train; `record_compute` is called in the main process when the
    model is written, with the FLOPs of training on a token and the statistics of the sequences.
    Must be called in every process.
    """
    process = distributed.process_state()
    with exclusive_lock(job.work, job.what, acquire=process.is_main_process):
        if process.is_main_process:
            pack(job.work)
        process.wait_for_everyone()
        dataset = open_packed(job.work, job.sequence_length, job.seed)
        checkpoint.keep_freed_memory()
        model = load_model()
        flops_per_token = training_flops_per_token(model, job.sequence_length)
        checkpoints = CheckpointManager(job.work, job.config.checkpoint_every, job.what)
        snapshots = _snapshot_writer(job, dataset)
        result = train_model(
            model,
            dataset,
            job.config,
            seed=job.seed,
            csv_path=job.csv,
            what=job.what,
            checkpoints=checkpoints,
            snapshots=snapshots,
            continual=job.continual,
            validation_hook=validation_hook,
            line_logger=line_logger,
            timing_path=job.timing,
        )
        if process.is_main_process:
            stats = packing_stats(job.work)
            _publish(job, model, result, stats, snapshots)
            if record_compute is not None:
                record_compute(flops_per_token, stats)
            checkpoints.clear()
        process.wait_for_everyone()


def _snapshot_writer(job: TrainingJob, dataset: PackedDataset) -> SnapshotWriter | None:
    if job.snapshots is None:
        return None
    past = (job.continual and job.continual.raw_tokens) or 0
    return SnapshotWriter(
        job.work / SNAPSHOT_FOLDER,
        job.snapshots,
        tokenizer=job.tokenizer,
        raw_tokens=lambda steps: past + dataset.num_raw_tokens(steps, job.config.batch_size),
        start=job.continual.steps if job.continual else 0,
    )


def _publish(
    job: TrainingJob,
    model: PreTrainedModel,
    result: TrainResult,
    stats: PackingStats,
    snapshots: SnapshotWriter | None,
) -> None:
    """Write the trained model, the snapshots (an empty folder where there are none, because DVC
    expects the output) and, where it is wanted, the state before the decay beside the model."""
    facts = {**stats, **job.facts, "steps": result.steps, "tokens": result.tokens}
    # Of an earlier run with another schedule; `final` would be taken for this run's weights.
    for name in (FINAL_FOLDER, PREDECAY_FOLDER):
        shutil.rmtree(job.out / name, ignore_errors=True)
    folder = job.out / FINAL_FOLDER if job.publish_predecay else job.out
    checkpoint.save_model(model, folder, job.tokenizer, facts, result.weights)
    if job.publish_predecay:
        state = checkpointing.read_state(job.work / PREDECAY_FILE)
        facts |= {"steps": state["steps"], "tokens": state["tokens"]}
        if snapshots is not None:
            facts[RAW_TOKENS_KEY] = snapshots.raw_tokens(state["steps"] - snapshots.start)
        weights = model_weights(state["model"])
        folder = job.out / PREDECAY_FOLDER
        checkpoint.save_model(model, folder, job.tokenizer, facts, weights)
        checkpointing.write_state(folder / OPTIMIZER_FILE, state["optimizers"])
    if snapshots is not None and job.snapshots_out is not None:
        snapshots.publish(job.snapshots_out, result.steps - snapshots.start)
    elif job.snapshots_out is not None:
        shutil.rmtree(job.snapshots_out, ignore_errors=True)
        job.snapshots_out.mkdir(parents=True)
