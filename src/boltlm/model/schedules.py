"""Learning rates as closed forms of the step."""

import math
from dataclasses import dataclass
from typing import Literal

from boltlm.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """`warmup_fraction` of all steps rise linearly; then a cosine falls to `least_ratio`."""

    kind: Literal["cosine"]
    warmup_fraction: float
    least_ratio: float

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_fraction < 1 or not 0 <= self.least_ratio <= 1:
            raise UserError("warmup_fraction lies in [0, 1), least_ratio in [0, 1]")


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: positive from the first step on."""
    warmup = schedule.warmup_fraction * steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.least_ratio + (1 - schedule.least_ratio) * cosine)
