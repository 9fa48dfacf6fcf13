"""Continual runs: each continues from the state that its parent saved before its decay
(docs/method.md, section 7)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from boltlm.errors import UserError
from boltlm.shard_store import is_complete
from boltlm.training import checkpointing
from boltlm.training.schedules import ScheduleConfig

OPTIMIZER_FILE, TRAINING_FILE = "optimizer.pt", "training.json"
# In TRAINING_FILE: the tokens of raw text that were trained on, counted where snapshots are kept.
RAW_TOKENS_KEY = "raw_tokens_seen"
# The settings that a continual run must share with its parent. The batch size is not among them:
# the moments are averages over steps, whatever the number of sequences in a step.
CONTINUAL_FIELDS = (
    "optimizer",
    "learning_rate",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "max_grad_norm",
    "sequence_length",
)


@dataclass(frozen=True, slots=True)
class ContinualState:
    """What a continual run continues from: the steps and tokens of its ancestors, and the file of
    the optimizer moments before its parent's decay. `raw_tokens`: the tokens of raw text that the
    ancestors were trained on; None where they were not counted."""

    steps: int
    tokens: int
    moments: Path
    raw_tokens: int | None


def load_continual_state(folder: Path, settings: Mapping[str, Any]) -> ContinualState:
    """The state in a parent's folder `predecay`. `settings`: of this run, by CONTINUAL_FIELDS.

    Raises UserError where the parent was trained with other settings.
    """
    parent = json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))
    differences = [
        f"{name} ({parent.get(name)} there, {settings[name]} here)"
        for name in CONTINUAL_FIELDS
        if parent.get(name) != settings[name]
    ]
    if differences:
        raise UserError(
            f"{folder}: cannot be resumed from, its settings differ: {', '.join(differences)}; use"
            " the same settings, or start from its final weights with schedule.kind cosine"
        )
    return ContinualState(
        steps=parent["steps"],
        tokens=parent["tokens"],
        moments=folder / OPTIMIZER_FILE,
        raw_tokens=parent.get(RAW_TOKENS_KEY),
    )


def check_moments(model: PreTrainedModel, path: Path) -> None:
    """Raises UserError where the optimizer moments in a file do not fit the model's parameters."""
    if not is_complete(path):
        raise UserError(f"{path} is corrupt; train the model that it belongs to again")
    state = checkpointing.read_state(path)["state"]
    shapes = {f"model.{name}": tuple(p.shape) for name, p in model.named_parameters()}
    for name, moments in state.items():
        for moment in moments.values():
            shape = tuple(moment.shape) if isinstance(moment, torch.Tensor) else ()
            if name not in shapes or shape not in ((), (1,), shapes[name]):
                raise UserError(
                    f"{path} belongs to another model: {name} has the shape {list(shape)} there,"
                    f" {list(shapes.get(name, ()))} in the weights"
                )
    if missing := shapes.keys() - state.keys():
        raise UserError(f"{path} belongs to another model: it lacks {min(missing)}")


def predecay_step(
    schedule: ScheduleConfig, steps: int, *, is_continual: bool, what: str
) -> int | None:
    """The step before which a run of `steps` steps saves its state for runs that continue it: the
    start of the `wsd` decay, None for other schedules.

    Raises UserError where the warm-up would reach into the decay.
    """
    if schedule.kind != "wsd":
        return None
    decay_start = schedule.decay_start(steps)
    warmup = 0.0 if is_continual else schedule.warmup_steps(steps)
    if decay_start == 0 or warmup > decay_start:
        raise UserError(
            f"{what}: {steps} steps are too few for the schedule: the decay begins after step"
            f" {decay_start}, but the warm-up takes {warmup:.0f} steps; increase the budget"
        )
    return decay_start
