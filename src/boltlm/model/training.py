"""Rows become a checkpoint: next-token cross-entropy on every token.

Shapes: B rows, L positions, V vocabulary.
"""

import csv
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from boltlm.errors import UserError
from boltlm.model import resume
from boltlm.model.resume import Checkpoints
from boltlm.model.schedules import Schedule, learning_rate
from boltlm.progress import Progress
from boltlm.seeds import generator
from boltlm.sequences.packing import IGNORED

COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Params sections `train` and `base.train`. `batch_rows`: sequences a step; `muon` takes
    the matrices of the layers and leaves embeddings, output and norms to AdamW; `log_every` and
    `checkpoint_every`: steps."""

    optimizer: Literal["adamw", "muon"]
    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_norm: float
    batch_rows: int
    precision: Literal["float32", "bfloat16"]
    schedule: Schedule
    log_every: int
    checkpoint_every: int

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip_norm", "batch_rows", "log_every", "checkpoint_every"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0, found {getattr(self, name)}")


def optimizers(model: torch.nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW over all, or Muon over the layers' matrices and AdamW over the rest."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = ".layers." in name and parameter.ndim == 2
        (matrices if inner and config.optimizer == "muon" else rest).append(parameter)
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            rest,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
    ]
    if matrices:
        made.append(
            torch.optim.Muon(
                matrices,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return made


def train(
    model: PreTrainedModel,
    inputs_RL: np.ndarray,
    labels_RL: np.ndarray,
    config: TrainConfig,
    *,
    seed: int,
    csv_path: Path | None,
    what: str,
    work: Path,
) -> tuple[dict[str, Any], Checkpoints]:
    """Train `model` in place on all rows, once, in a shuffled order; return steps and tokens, and
    the checkpoints in `work`, to be cleared when the model is saved.

    The stream already holds its epochs, so a row is seen once. A training that was killed goes on
    behind its last checkpoint, with the numbers that it would have had. Raises UserError when the
    loss stops being a number.
    """
    torch.manual_seed(seed)
    name = resume.key(model, (inputs_RL, labels_RL), {**asdict(config), "seed": seed})
    kept = Checkpoints(work, name, config.checkpoint_every, what)
    mixed = "bf16" if config.precision == "bfloat16" else "no"
    accelerator = Accelerator(mixed_precision=mixed)
    model.train()
    prepared = accelerator.prepare(model)
    steppers = optimizers(model, config)
    order = generator(seed, "rows").permutation(len(inputs_RL))
    steps = math.ceil(len(order) / config.batch_rows)
    state = kept.latest()
    first = state["steps"] if state else 0
    left = labels_RL[order[first * config.batch_rows :]]
    with (
        _Log(csv_path, state["log"] if state else None) as log,
        Progress(what=what, total=int((left != IGNORED).sum()), unit="tokens") as progress,
    ):
        if state:
            _restore(state, model, steppers)
        for step in range(first, steps):
            rows = order[step * config.batch_rows : (step + 1) * config.batch_rows]
            rate = learning_rate(config.schedule, config.learning_rate, step, steps)
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = rate
            inputs_BL = torch.from_numpy(inputs_RL[rows]).to(accelerator.device)
            labels_BL = torch.from_numpy(labels_RL[rows]).to(accelerator.device)
            with accelerator.autocast():
                logits_BLV = prepared(input_ids=inputs_BL, use_cache=False).logits
            loss = cross_entropy(
                logits_BLV.flatten(0, 1).float(), labels_BL.flatten(), ignore_index=IGNORED
            )
            accelerator.backward(loss)
            norm: Any = accelerator.clip_grad_norm_(model.parameters(), config.clip_norm)
            for stepper in steppers:
                stepper.step()
                stepper.zero_grad()
            tokens = int((labels_RL[rows] != IGNORED).sum())
            value = loss.item()
            if not math.isfinite(value):
                raise UserError(
                    f"{what}: loss is {value} at step {step + 1}; lower train.learning_rate"
                )
            log.add(
                tokens, value, rate, float(norm), last=step == steps - 1, every=config.log_every
            )
            if kept.due(step + 1, steps):
                kept.save(step + 1, _state(step + 1, model, steppers, log))
            progress.note(f"loss {value:.3f}")
            progress.advance(tokens)
    model.eval()
    return {"steps": steps, "tokens": log.tokens}, kept


def _state(
    steps: int, model: PreTrainedModel, steppers: list[torch.optim.Optimizer], log: "_Log"
) -> dict[str, Any]:
    return {
        "steps": steps,
        "model": model.state_dict(),
        "optimizers": [stepper.state_dict() for stepper in steppers],
        "random": torch.get_rng_state(),
        "random_gpus": torch.cuda.get_rng_state_all(),
        "log": log.state(),
    }


def _restore(
    state: dict[str, Any], model: PreTrainedModel, steppers: list[torch.optim.Optimizer]
) -> None:
    model.load_state_dict(state["model"])
    for stepper, saved in zip(steppers, state["optimizers"], strict=True):
        stepper.load_state_dict(saved)
    torch.set_rng_state(state["random"])
    torch.cuda.set_rng_state_all(state["random_gpus"])


class _Log:
    """`metrics/train/<name>.csv`: one line every n steps, the loss averaged over its tokens.
    `before`: the `state` of a log to go on with."""

    def __init__(self, path: Path | None, before: dict[str, Any] | None = None) -> None:
        self.path = path
        self.lines: list[list[str]] = before["lines"] if before else []
        self.step: int = before["step"] if before else 0
        self.tokens: int = before["tokens"] if before else 0
        self.sum: float = before["sum"] if before else 0.0
        self.since: int = before["since"] if before else 0
        self.told = time.monotonic()
        self.started = self.told - (before["seconds"] if before else 0.0)

    def state(self) -> dict[str, Any]:
        return {
            "lines": self.lines,
            "step": self.step,
            "tokens": self.tokens,
            "sum": self.sum,
            "since": self.since,
            "seconds": time.monotonic() - self.started,
        }

    def __enter__(self) -> "_Log":
        self.file = None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("w", newline="", encoding="utf-8")
            self.csv = csv.writer(self.file)
            self.csv.writerows([COLUMNS, *self.lines])
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def add(
        self, tokens: int, loss: float, rate: float, norm: float, *, last: bool, every: int
    ) -> None:
        self.step += 1
        self.tokens += tokens
        self.since += tokens
        self.sum += loss * tokens
        if not (last or self.step % every == 0):
            return
        now = time.monotonic()
        speed = self.since / max(now - self.told, 1e-9)
        loss = self.sum / self.since
        line = [
            f"{self.step}",
            f"{self.tokens}",
            f"{loss:.6f}",
            f"{rate:.6g}",
            f"{norm:.4f}",
            f"{speed:.0f}",
            f"{now - self.started:.1f}",
        ]
        self.lines.append(line)
        if self.file is not None:
            self.csv.writerow(line)
        self.told, self.sum, self.since = now, 0.0, 0
