"""Rows become a checkpoint: next-token cross-entropy on every token.

Shapes: B rows, L positions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from boltlm.errors import UserError
from boltlm.model import attention, flops, parallel, resume
from boltlm.model.curve import Curve, Live
from boltlm.model.loss import CausalLoss, check_head
from boltlm.model.resume import PREDECAY, Checkpoints
from boltlm.model.schedules import Schedule, learning_rate
from boltlm.model.settings import TrainConfig, optimizers
from boltlm.progress import Progress
from boltlm.seeds import generator
from boltlm.sequences.examples import Examples
from boltlm.sequences.packing import IGNORED, Rows

EXPLODED = 2.0  # times the loss of a uniform guess, and of the first step
Hook = Callable[[PreTrainedModel], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Start:
    """What a continual run goes on from: its ancestors' steps and tokens, and the file of the
    moments that the optimisers had before the last decay."""

    steps: int
    tokens: int
    moments: Path


@dataclass(frozen=True, slots=True)
class Trained:
    """Steps and tokens, those of ancestors included. `weights`: of a sharded model, gathered in
    the main process; null where the model itself holds them."""

    steps: int
    tokens: int
    weights: dict[str, torch.Tensor] | None


def train(
    model: PreTrainedModel,
    rows: Rows | Examples,
    config: TrainConfig,
    *,
    seed: int,
    csv_path: Path | None,
    what: str,
    kept: Checkpoints,
    start: Start | None = None,
    hook: Hook | None = None,
    live: Live | None = None,
) -> Trained:
    """Train `model` in place on all rows, once.

    In one process or in as many as the launcher started, with the same numbers. A training that
    was killed goes on behind its last checkpoint in `kept`, which the caller clears when the model
    is saved. With the schedule `wsd`, the state before the decay is kept there as PREDECAY. `hook`
    measures the model as `evaluate` says, and at the end. Raises UserError when the loss
    stops being a number or explodes; the last good checkpoint stays.
    """
    here, device = parallel.machine(), parallel.device()
    steps = math.ceil(len(rows) / config.batch_rows)
    decay = _decay(config.schedule, steps, warm=start is not None, what=what)
    if config.evaluate and parallel.sharded():
        raise UserError("train.evaluate must be null with FSDP, whose weights lie in pieces")
    module, steppers = _prepared(model, config)
    known = _restored(module, steppers, kept, decay, start)
    begun = known["steps"] if known else 0
    share = flops.per_token(model, rows.length) / (
        flops.peak(device, getattr(torch, config.precision)) * here.num_processes
    )
    curve = Curve(
        csv_path if here.is_main_process else None,
        every=config.log_every,
        flops=share,
        memory=lambda: flops.memory_mib(device),
        steps=start.steps if start else 0,
        tokens=start.tokens if start else 0,
        before=known["log"] if known else None,
        live=live if here.is_main_process else None,
    )
    progress = Progress(
        what=what,
        total=rows.predicted(begun, config.batch_rows),
        unit="tokens",
        silent=not here.is_main_process,
    )
    suits = attention.suits(model, rows.length, getattr(torch, config.precision))
    with curve, progress, attention.attention(model, attention.NAME if suits else None):
        for step in range(begun, steps):
            if step == decay:
                _keep(kept.folder / PREDECAY, module, steppers, curve)
            rate = learning_rate(
                config.schedule, config.learning_rate, step, steps, warm=start is not None
            )
            torch.manual_seed(_seed(seed, step))
            try:
                loss, tokens = _gradients(module, rows.batch(step, config.batch_rows), config)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{what}: the GPU's memory is too small; lower train.micro_rows (rows at once)"
                    " or set train.activation_checkpointing, and run again to go on"
                ) from error
            norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            _check(step, loss, norm, curve, model.config.vocab_size, what, kept)
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = rate
                stepper.step()
                stepper.zero_grad()
            last = step == steps - 1
            measured: Mapping[str, float] = {}
            if hook and config.evaluate and (last or (step + 1) % config.evaluate.every == 0):
                with curve.paused():
                    measured = _measured(model, hook)
            curve.add(tokens, loss, rate=rate, norm=norm, heldout=measured, last=last)
            if kept.due(step + 1, steps):
                found = parallel.state(module, steppers)
                if here.is_main_process:
                    kept.save(step + 1, {"steps": step + 1, "log": curve.state(), **found})
            progress.note(f"loss {loss:.3f}")
            progress.advance(tokens)
    weights = parallel.state(module, steppers)["model"] if parallel.sharded() else None
    if config.activation_checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()
    return Trained(curve.step, curve.tokens, None if weights is None else of_model(weights))


def of_model(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the names that they have in the model, not in the loss around it."""
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


def _decay(schedule: Schedule, steps: int, *, warm: bool, what: str) -> int | None:
    """The step at which a decay begins, null for a schedule without one."""
    if schedule.kind != "wsd":
        return None
    decay, warmup = schedule.decay_start(steps), 0.0 if warm else schedule.warmup_steps(steps)
    if decay == 0 or warmup > decay:
        raise UserError(
            f"{what}: {steps} steps are too few for the schedule: the decay begins behind step"
            f" {decay}, the warm-up takes {warmup:.0f}"
        )
    return decay


def _restored(
    module: torch.nn.Module,
    steppers: list[torch.optim.Optimizer],
    kept: Checkpoints,
    decay: int | None,
    start: Start | None,
) -> dict[str, Any] | None:
    """Take over the last checkpoint, or else what the run goes on from; return the steps and the
    curve of the former."""
    state = kept.latest(decay) if parallel.machine().is_main_process else None
    known = parallel.told(state and {"steps": state["steps"], "log": state["log"]})
    if known:
        parallel.restore(module, steppers, state or {})
    elif start is not None:
        main = parallel.machine().is_main_process
        moments = resume.read(start.moments) if main else {}
        parallel.restore(module, steppers, {"optimizers": moments})
    return known


def _prepared(
    model: PreTrainedModel, config: TrainConfig
) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
    check_head(model)
    model.train()
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        for block in parallel.blocks(model):
            block.compile()
    module = parallel.spread(CausalLoss(model), model)
    return module, optimizers(model, config)


def _gradients(
    module: torch.nn.Module, batch: tuple[np.ndarray, np.ndarray], config: TrainConfig
) -> tuple[float, int]:
    """Leave in the parameters the gradient of the batch's mean loss; return that and its tokens.
    Every process takes its share of the rows, the same number of them, empty ones if need be."""
    here, device = parallel.machine(), parallel.device()
    inputs_BL, labels_BL = batch
    tokens = int((labels_BL != IGNORED).sum())
    world = here.num_processes
    share = -(-len(inputs_BL) // world)
    mine = [array[here.process_index :: world] for array in (inputs_BL, labels_BL)]
    lacking = share - len(mine[0])
    if lacking:
        mine = [
            np.pad(array, ((0, lacking), (0, 0)), constant_values=fill)
            for array, fill in zip(mine, (0, IGNORED), strict=True)
        ]
    inputs, labels = (torch.from_numpy(array).to(device) for array in mine)
    size = config.micro_rows or share
    total = torch.zeros((), device=device)
    for first in range(0, share, size):
        mixed = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
        with parallel.accumulating(module, first + size >= share):
            with mixed:
                loss = module(inputs[first : first + size], labels[first : first + size])
            (loss * (world / tokens)).backward()
        total += loss.detach()
    return float(parallel.added_up(total)) / tokens, tokens


def _seed(seed: int, step: int) -> int:
    """Of a step's dropout in this process, so that no state of it need be kept."""
    process = parallel.machine().process_index
    return int(generator(seed, "step", step, process).integers(2**62))


def _keep(
    path: Path, module: torch.nn.Module, steppers: list[torch.optim.Optimizer], curve: Curve
) -> None:
    """The state before the decay, for the run that goes on from there."""
    found = parallel.state(module, steppers)
    if parallel.machine().is_main_process:
        resume.write(path, {"steps": curve.step, "tokens": curve.tokens, **found})


def _check(
    step: int,
    loss: float,
    norm: float,
    curve: Curve,
    vocabulary: int,
    what: str,
    kept: Checkpoints,
) -> None:
    """Raises UserError before a step that would spoil the weights."""
    guess = math.log(vocabulary)
    most = EXPLODED * max(guess, guess if curve.first is None else curve.first)
    good = math.isfinite(loss) and math.isfinite(norm)
    if good and (curve.first is None or loss <= most):
        return
    fault = f"loss is {loss:.4g}" if not math.isfinite(loss) or good else f"gradient is {norm}"
    left = f"; the checkpoint of step {kept.kept} is in {kept.folder}" if kept.kept else ""
    raise UserError(
        f"{what}: {fault} at step {step + 1} of this run{left}; lower train.learning_rate"
    )


def _measured(model: PreTrainedModel, hook: Hook) -> dict[str, float]:
    """The hook's measures, taken by the main process while the others wait."""
    found: dict[str, float] = {}
    if parallel.machine().is_main_process:
        model.eval()
        with attention.attention(model, "sdpa" if attention.active(model) else None):
            found = dict(hook(model))
        model.train()
    return parallel.told(found)
