"""Rows become a checkpoint: next-token cross-entropy on every token.

Shapes: B rows, L positions, V vocabulary.
"""

import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from boltlm.errors import UserError
from boltlm.model.schedules import Schedule, learning_rate
from boltlm.progress import Progress
from boltlm.seeds import generator
from boltlm.sequences.packing import IGNORED

COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Params sections `train` and `base.train`. `batch_rows`: sequences a step; `muon` takes
    the matrices of the layers and leaves embeddings, output and norms to AdamW."""

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

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip_norm", "batch_rows", "log_every"):
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
) -> dict[str, Any]:
    """Train `model` in place on all rows, once, in a shuffled order; return steps and tokens.

    The stream already holds its epochs, so a row is seen once. Raises UserError when the loss
    stops being a number.
    """
    torch.manual_seed(seed)
    mixed = "bf16" if config.precision == "bfloat16" else "no"
    accelerator = Accelerator(mixed_precision=mixed)
    model.train()
    prepared = accelerator.prepare(model)
    steppers = optimizers(model, config)
    order = generator(seed, "rows").permutation(len(inputs_RL))
    steps = math.ceil(len(order) / config.batch_rows)
    with (
        _Log(csv_path) as log,
        Progress(what=what, total=int((labels_RL != IGNORED).sum()), unit="tokens") as progress,
    ):
        for step in range(steps):
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
            progress.note(f"loss {value:.3f}")
            progress.advance(tokens)
    model.eval()
    return {"steps": steps, "tokens": log.tokens}


class _Log:
    """`metrics/train/<name>.csv`: one line every n steps, the loss averaged over its tokens."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.step, self.tokens = path, 0, 0
        self.started = self.told = time.monotonic()
        self.sum = 0.0
        self.since = 0

    def __enter__(self) -> "_Log":
        self.file = None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("w", newline="", encoding="utf-8")
            self.csv = csv.writer(self.file)
            self.csv.writerow(COLUMNS)
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
        if self.file is None or not (last or self.step % every == 0):
            return
        now = time.monotonic()
        speed = self.since / max(now - self.told, 1e-9)
        loss = self.sum / self.since
        self.csv.writerow(
            (
                self.step,
                self.tokens,
                f"{loss:.6f}",
                f"{rate:.6g}",
                f"{norm:.4f}",
                f"{speed:.0f}",
                f"{now - self.started:.1f}",
            )
        )
        self.told, self.sum, self.since = now, 0.0, 0
