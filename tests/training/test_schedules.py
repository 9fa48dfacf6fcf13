"""Learning rates: the closed forms, at points that can be computed by hand."""

import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.errors import UserError
from boltlm.param_values import build
from boltlm.training.schedules import ScheduleConfig, learning_rate


def cosine(warmup: float, min_lr_ratio: float) -> ScheduleConfig:
    return ScheduleConfig(
        kind="cosine", warmup=warmup, decay_fraction=0.15, min_lr_ratio=min_lr_ratio
    )


def wsd(warmup: float, decay_fraction: float, min_lr_ratio: float) -> ScheduleConfig:
    return ScheduleConfig(
        kind="wsd", warmup=warmup, decay_fraction=decay_fraction, min_lr_ratio=min_lr_ratio
    )


def cosine_rates(warmup: float, min_lr_ratio: float, steps: int) -> list[float]:
    """All rates of a cosine run with the peak rate 2."""
    schedule = cosine(warmup, min_lr_ratio)
    return [learning_rate(schedule, 2.0, step, steps) for step in range(steps)]


def test_cosine_without_warmup() -> None:
    """Equation (11) with W = 0 and r = 0: the peak at step 0 and half of it in the middle."""
    rates = cosine_rates(0.0, 0.0, 8)
    assert rates == pytest.approx([1 + math.cos(math.pi * step / 8) for step in range(8)])
    assert rates[0] == 2.0
    assert rates[4] == pytest.approx(1.0)


def test_cosine_with_warmup_and_minimum() -> None:
    """Equation (11): 4 of 20 steps rise by fifths of the peak; then 16 steps of cosine between the
    peak and a quarter of it."""
    rates = cosine_rates(0.2, 0.25, 20)
    assert rates[:4] == pytest.approx([2.0 * fifths / 5 for fifths in (1, 2, 3, 4)])
    assert rates[4] == 2.0
    assert rates[8] == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[12] == pytest.approx(0.5 + 1.5 * 0.5)
    assert rates[19] == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * 15 / 16)))


@given(warmup=st.floats(0, 0.99), min_lr_ratio=st.floats(0, 1), steps=st.integers(1, 300))
def test_cosine_rises_then_falls_within_bounds(
    warmup: float, min_lr_ratio: float, steps: int
) -> None:
    """Positive, never above the peak, a single maximum: for any warm-up and any number of steps,
    one or two included."""
    rates = cosine_rates(warmup, min_lr_ratio, steps)
    assert all(0 < rate <= 2.0 for rate in rates)
    peak = rates.index(max(rates))
    assert peak <= warmup * steps + 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    after_warmup = rates[math.ceil(warmup * steps) :]
    assert all(rate >= 2.0 * min_lr_ratio * (1 - 1e-12) for rate in after_warmup)


def test_warmup_in_steps() -> None:
    """A warm-up of 1 or more is a number of steps, as the paper gives it."""
    assert cosine_rates(4, 0.25, 20) == cosine_rates(0.2, 0.25, 20)
    assert cosine_rates(1, 0.0, 8)[:2] == pytest.approx([1.0, 2.0])


def test_warmup_stable_decay() -> None:
    """Equation (12): 2 of 20 steps rise by thirds, then the peak, then the last 5 fall by fifths
    towards the minimum. A continual run has no warm-up."""
    schedule = wsd(2, 0.25, 0.5)
    rates = [learning_rate(schedule, 3.0, step, 20) for step in range(20)]
    assert schedule.decay_start(20) == 15
    assert rates[:2] == pytest.approx([1.0, 2.0])
    assert rates[2:16] == [3.0] * 14
    assert rates[15:] == pytest.approx([3.0 - 1.5 * fifths / 5 for fifths in range(5)])
    continual = [learning_rate(schedule, 3.0, step, 20, continual=True) for step in range(20)]
    assert continual == [3.0, 3.0, *rates[2:]]


@given(
    steps=st.integers(1, 300),
    decay_fraction=st.floats(0.01, 1.0),
    warmup=st.floats(0, 0.5),
    further_steps=st.integers(1, 300),
)
def test_rates_before_the_decay_do_not_depend_on_the_end(
    steps: int, decay_fraction: float, warmup: float, further_steps: int
) -> None:
    """In continual runs of any length, all steps before the decay have the peak rate, so a chain of
    runs equals one long run; and the decay has at least one step."""
    schedule = wsd(warmup, decay_fraction, 0.0)
    decay_start = schedule.decay_start(steps)
    assert 0 <= decay_start < steps
    rates = [learning_rate(schedule, 2.0, step, steps, continual=True) for step in range(steps)]
    assert rates[: decay_start + 1] == [2.0] * (decay_start + 1)
    assert rates[decay_start:] == sorted(rates[decay_start:], reverse=True)
    assert abs(steps - decay_start - decay_fraction * steps) <= 1
    assert learning_rate(schedule, 2.0, 0, steps + further_steps, continual=True) == 2.0


@pytest.mark.parametrize(
    ("warmup", "min_lr_ratio", "message"),
    [
        (-0.1, 0.1, r"warmup must be 0 or more, found -0\.1"),
        (0.1, 1.5, r"min_lr_ratio must be in \[0, 1\], found 1\.5"),
        (0.1, -1.0, r"min_lr_ratio must be in \[0, 1\], found -1\.0"),
    ],
)
def test_impossible_schedules_are_an_error(
    warmup: float, min_lr_ratio: float, message: str
) -> None:
    """A negative warm-up, or a minimum above the peak or below 0."""
    with pytest.raises(UserError, match=message):
        build(ScheduleConfig, asdict(cosine(warmup, min_lr_ratio)), "schedule")


@pytest.mark.parametrize("decay_fraction", [0.0, 1.5])
def test_the_decay_is_a_fraction_of_the_steps(decay_fraction: float) -> None:
    """With a decay of no step, `final` would equal `predecay`."""
    with pytest.raises(UserError, match="decay_fraction"):
        build(ScheduleConfig, asdict(wsd(0.1, decay_fraction, 0.1)), "schedule")
