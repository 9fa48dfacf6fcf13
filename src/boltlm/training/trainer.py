"""The training loop: next-token cross-entropy over the target tokens of a dataset, one pass."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from boltlm.errors import UserError
from boltlm.progress import Progress
from boltlm.timing import write_timing
from boltlm.training import attention, checkpointing, distributed, hardware
from boltlm.training.checkpointing import PREDECAY_FILE, CheckpointManager
from boltlm.training.compute import training_flops_per_token
from boltlm.training.config import TrainConfig
from boltlm.training.continual import ContinualState, predecay_step
from boltlm.training.divergence import check_divergence
from boltlm.training.gradients import TrainingDataset, accumulate_gradients, step_seed
from boltlm.training.loss import CausalLMLoss, check_output_head, model_weights
from boltlm.training.metrics_logger import LineLogger, MetricsLogger
from boltlm.training.optimizer import build_optimizers
from boltlm.training.schedules import learning_rate
from boltlm.training.snapshots import SnapshotWriter

ValidationHook = Callable[[PreTrainedModel], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Steps and target tokens, those of a continual run's ancestors included. `weights`: the
    weights of a sharded model, gathered in the main process; None where the model holds them."""

    steps: int
    tokens: int
    weights: dict[str, torch.Tensor] | None


def train_model(
    model: PreTrainedModel,
    dataset: TrainingDataset,
    config: TrainConfig,
    *,
    seed: int,
    csv_path: Path | None,
    what: str,
    checkpoints: CheckpointManager,
    snapshots: SnapshotWriter | None = None,
    continual: ContinualState | None = None,
    validation_hook: ValidationHook | None = None,
    line_logger: LineLogger | None = None,
    timing_path: Path | None = None,
) -> TrainResult:
    """Train `model` in place, one pass over `dataset`, and leave it in evaluation mode.

    The result is the same for any number of processes, up to rounding. A run that was killed is
    resumed from its last checkpoint in `checkpoints`; the caller clears them when the model is
    saved. With the schedule `wsd` the state before the decay is saved there as PREDECAY_FILE.
    `snapshots` keeps the weights of some steps. `validation_hook` is called as `config.validation`
    says, and at the end. The log is written to `csv_path`, its wall-clock figures at the end to
    `timing_path`. `what`: the label of messages.

    Raises UserError where the loss diverges; the last checkpoint then remains.
    """
    trainer = Trainer(
        model,
        dataset,
        config,
        seed=seed,
        what=what,
        checkpoints=checkpoints,
        snapshots=snapshots,
        continual=continual,
    )
    main = distributed.process_state().is_main_process
    logger = trainer.open_logger(
        csv_path if main else None, line_logger if main else None, continual
    )
    total = dataset.num_target_tokens(trainer.first_step, config.batch_size)
    progress = Progress(what=what, total=total, unit="tokens", silent=not main)
    with logger, progress, attention.use_attention(model, trainer.attention_name()):
        for step in range(trainer.first_step, trainer.steps):
            loss, tokens = trainer.train_step(step, logger, validation_hook)
            progress.note(f"loss {loss:.3f}")
            progress.advance(tokens)
    if main and timing_path is not None and csv_path is not None:
        write_timing(timing_path, csv_path, logger.timings)
    return TrainResult(logger.step, logger.tokens, trainer.finish())


class Trainer:
    """A training run in one process: model, optimizers and checkpoints. The constructor prepares
    them and restores the last checkpoint; `train_step` is then called for each of the steps from
    `first_step` to `steps`, and `finish` at the end."""

    def __init__(
        self,
        model: PreTrainedModel,
        dataset: TrainingDataset,
        config: TrainConfig,
        *,
        seed: int,
        what: str,
        checkpoints: CheckpointManager,
        snapshots: SnapshotWriter | None,
        continual: ContinualState | None,
    ) -> None:
        self.model, self.dataset, self.config = model, dataset, config
        self.seed, self.what = seed, what
        self.checkpoints, self.snapshots = checkpoints, snapshots
        self.is_continual = continual is not None
        self.process = distributed.process_state()
        self.device = distributed.process_device()
        self.dtype: torch.dtype = getattr(torch, config.precision)
        self.steps = math.ceil(len(dataset) / config.batch_size)
        self.decay_start = predecay_step(
            config.schedule, self.steps, is_continual=self.is_continual, what=what
        )
        if config.validation and distributed.is_sharded():
            raise UserError("train.validation must be null with FSDP, which shards the weights")
        self.module, self.optimizers = _prepare(model, config)
        checkpoint = self._restore(continual)
        self.first_step: int = checkpoint["steps"] if checkpoint else 0
        self.logger_state: dict[str, Any] | None = checkpoint and checkpoint["logger"]

    def open_logger(
        self,
        csv_path: Path | None,
        line_logger: LineLogger | None,
        continual: ContinualState | None,
    ) -> MetricsLogger:
        """The logger of this run; it continues the log of the run that is resumed."""
        peak_flops = hardware.peak_flops(self.device, self.dtype) * self.process.num_processes
        flops_per_token = training_flops_per_token(self.model, self.dataset.sequence_length)
        return MetricsLogger(
            csv_path,
            every=self.config.log_every,
            ideal_seconds_per_token=flops_per_token / peak_flops,
            peak_memory_mib=lambda: hardware.peak_memory_mib(self.device),
            steps=continual.steps if continual else 0,
            tokens=continual.tokens if continual else 0,
            state=self.logger_state,
            line_logger=line_logger,
        )

    def attention_name(self) -> str | None:
        """The attention implementation to train with; None for the model's own."""
        length = self.dataset.sequence_length
        is_supported = attention.supports_short_attention(self.model, length, self.dtype)
        return attention.SHORT_ATTENTION if is_supported else None

    def train_step(
        self, step: int, logger: MetricsLogger, validation_hook: ValidationHook | None
    ) -> tuple[float, int]:
        """Make step `step` (counted from 0): update the weights, validate, log, and save a snapshot
        and a checkpoint. Returns the mean loss and the number of target tokens of the batch."""
        if step == self.decay_start:
            self._save_predecay(logger)
        lr = learning_rate(
            self.config.schedule,
            self.config.learning_rate,
            step,
            self.steps,
            continual=self.is_continual,
        )
        torch.manual_seed(step_seed(self.seed, step))
        batch = self.dataset.batch(step, self.config.batch_size)
        loss, tokens = self._backward(batch)
        grad_norm = self._clip_gradients()
        check_divergence(
            loss,
            grad_norm,
            step=step + 1,
            first_loss=logger.first_loss,
            vocab_size=self.model.config.vocab_size,
            checkpoints=self.checkpoints,
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        is_last = step == self.steps - 1
        validation: Mapping[str, float] = {}
        if validation_hook and self._validates_after(step):
            with logger.paused():
                validation = self._validate(validation_hook)
        logger.add(
            tokens,
            loss,
            positions=batch[0].size,
            lr=lr,
            grad_norm=grad_norm,
            validation=validation,
            last=is_last,
        )
        # First the snapshot: a run that is resumed from the checkpoint does not repeat this step.
        self._save_snapshot(logger, is_last=is_last)
        if self.checkpoints.is_due(step + 1, self.steps):
            self._save_checkpoint(step + 1, logger)
        return loss, tokens

    def finish(self) -> dict[str, torch.Tensor] | None:
        """Return the model to evaluation mode, and the gathered weights of a sharded model."""
        weights = None
        if distributed.is_sharded():
            state = distributed.full_state(self.module, self.optimizers)
            weights = model_weights(state["model"])
        if self.config.activation_checkpointing:
            self.model.gradient_checkpointing_disable()
        self.model.eval()
        return weights

    def _restore(self, continual: ContinualState | None) -> dict[str, Any] | None:
        """Load the last checkpoint, or else the moments that a continual run starts with. Returns
        the steps and the logger's state of the checkpoint, None without one."""
        main = self.process.is_main_process
        state = self.checkpoints.load_latest(self.decay_start) if main else None
        checkpoint = distributed.broadcast(
            state and {"steps": state["steps"], "logger": state["logger"]}
        )
        if checkpoint:
            distributed.load_full_state(self.module, self.optimizers, state or {})
        elif continual is not None:
            moments = checkpointing.read_state(continual.moments) if main else {}
            distributed.load_full_state(self.module, self.optimizers, {"optimizers": moments})
        return checkpoint

    def _backward(self, batch: tuple[np.ndarray, ...]) -> tuple[float, int]:
        """`accumulate_gradients` of a batch. Raises UserError where the GPU's memory does not
        suffice."""
        try:
            return accumulate_gradients(self.module, batch, self.config)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.what}: the GPU has too little memory; lower train.micro_batch_size or set"
                " train.activation_checkpointing, then run again to resume"
            ) from error

    def _clip_gradients(self) -> float:
        """Clip the gradients' norm; returns what it was."""
        weights, max_norm = self.model.parameters(), self.config.max_grad_norm
        norm: Any = torch.nn.utils.clip_grad_norm_(weights, max_norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _validates_after(self, step: int) -> bool:
        config = self.config.validation
        return config is not None and (step == self.steps - 1 or (step + 1) % config.every == 0)

    def _validate(self, validation_hook: ValidationHook) -> dict[str, float]:
        """The hook's metrics, measured by the main process while the others wait."""
        metrics: dict[str, float] = {}
        if self.process.is_main_process:
            self.model.eval()
            name = "sdpa" if attention.uses_short_attention(self.model) else None
            with attention.use_attention(self.model, name):
                metrics = dict(validation_hook(self.model))
            self.model.train()
        return distributed.broadcast(metrics)

    def _save_snapshot(self, logger: MetricsLogger, *, is_last: bool) -> None:
        """Save the snapshot of the last step made, where it is wanted and was not saved before the
        run was resumed."""
        snapshots, step = self.snapshots, logger.step
        if snapshots is None or not snapshots.is_due(step, is_last=is_last):
            return
        if not distributed.broadcast(snapshots.is_saved(step)):
            weights = model_weights(distributed.full_weights(self.module))
            if self.process.is_main_process:
                snapshots.save(self.model, weights, step, logger.tokens)

    def _save_checkpoint(self, steps: int, logger: MetricsLogger) -> None:
        state = distributed.full_state(self.module, self.optimizers)
        if self.process.is_main_process:
            self.checkpoints.save(steps, {"steps": steps, "logger": logger.state(), **state})

    def _save_predecay(self, logger: MetricsLogger) -> None:
        """Save the state before the decay, for the run that continues from it."""
        state = distributed.full_state(self.module, self.optimizers)
        if self.process.is_main_process:
            counts = {"steps": logger.step, "tokens": logger.tokens}
            checkpointing.write_state(self.checkpoints.folder / PREDECAY_FILE, {**counts, **state})


def _prepare(
    model: PreTrainedModel, config: TrainConfig
) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    """The model with its loss, as this process trains it, and the optimizers."""
    check_output_head(model)
    model.train()
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        for block in distributed.transformer_blocks(model):
            block.compile()
    module = distributed.wrap_model(CausalLMLoss(model), model)
    return module, build_optimizers(model, config)
