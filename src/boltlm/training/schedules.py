"""Learning rates as closed forms of the step (docs/method.md, section 7)."""

import math
from dataclasses import dataclass
from typing import Literal

from boltlm.param_types import Fraction, NonNegativeFloat, PositiveFraction


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """A linear warm-up, then a decay to `min_lr_ratio` of the peak rate.

    `warmup`: a fraction of all steps if below 1, else a number of steps. `cosine` decays over all
    remaining steps (equation 11); `wsd` stays at the peak and decays linearly over the last
    `decay_fraction` of the steps (equation 12).
    """

    kind: Literal["cosine", "wsd"]
    warmup: NonNegativeFloat
    decay_fraction: PositiveFraction
    min_lr_ratio: Fraction

    def warmup_steps(self, steps: int) -> float:
        """The length W of the warm-up of a run of `steps` steps; it need not be an integer."""
        return self.warmup * steps if self.warmup < 1 else self.warmup

    def decay_start(self, steps: int) -> int:
        """The first step S_d (counted from 0) of the `wsd` decay, 0 for `cosine`.

        The steps before it do not depend on the total number of steps, so a later run can
        continue from the state at S_d.
        """
        return steps - max(1, round(self.decay_fraction * steps)) if self.kind == "wsd" else 0


def learning_rate(
    schedule: ScheduleConfig, peak: float, step: int, steps: int, *, continual: bool = False
) -> float:
    """The learning rate of step `step` (counted from 0) of `steps`, equations (11) and (12).

    It is positive from the first step on. `continual`: the run continues one that has already had
    its warm-up, and has none itself.
    """
    warmup = 0.0 if continual else schedule.warmup_steps(steps)
    if schedule.kind == "wsd":
        decay_start = schedule.decay_start(steps)
        rise = min(1.0, (step + 1) / (warmup + 1)) if step < warmup else 1.0
        decayed = (step - decay_start) / (steps - decay_start) if step > decay_start else 0.0
        return peak * rise * (1 - (1 - schedule.min_lr_ratio) * decayed)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * cosine)
