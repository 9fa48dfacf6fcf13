"""Learning rates as closed forms of the step (SPEC section 7)."""

import math
from dataclasses import dataclass
from typing import Literal

from boltlm.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """`warmup`: a linear rise, below 1 a share of all steps, else so many steps. Then `cosine`
    falls to `least_ratio` of the peak; `wsd` stays at the peak and falls linearly to
    `least_ratio` over the last `decay_fraction` of the steps."""

    kind: Literal["cosine", "wsd"]
    warmup: float
    decay_fraction: float
    least_ratio: float

    def __post_init__(self) -> None:
        if self.warmup < 0 or not 0 <= self.least_ratio <= 1:
            raise UserError("warmup is 0 or more, least_ratio lies in [0, 1]")
        if not 0 < self.decay_fraction <= 1:
            raise UserError(f"decay_fraction lies in (0, 1], found {self.decay_fraction}")

    def warmup_steps(self, steps: int) -> float:
        return self.warmup * steps if self.warmup < 1 else self.warmup

    def decay_start(self, steps: int) -> int:
        """The first step (from 0) of the fall; all steps before it are the same whatever comes
        after, so that a continual run goes on from there."""
        return steps - max(1, round(self.decay_fraction * steps)) if self.kind == "wsd" else 0


def learning_rate(
    schedule: Schedule, peak: float, step: int, steps: int, *, warm: bool = False
) -> float:
    """The rate of step `step` (from 0) of `steps`: positive from the first step on. `warm`: the
    run goes on from one that has had its warm-up."""
    warmup = 0.0 if warm else schedule.warmup_steps(steps)
    if schedule.kind == "wsd":
        start = schedule.decay_start(steps)
        rise = min(1.0, (step + 1) / (warmup + 1)) if step < warmup else 1.0
        fall = (step - start) / (steps - start) if step > start else 0.0
        return peak * rise * (1 - (1 - schedule.least_ratio) * fall)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.least_ratio + (1 - schedule.least_ratio) * cosine)
