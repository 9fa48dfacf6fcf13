"""Learning rates: the closed form, at points that can be reckoned by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.errors import UserError
from boltlm.model.schedules import Schedule, learning_rate


def cosine(warmup: float, least_ratio: float) -> Schedule:
    return Schedule(kind="cosine", warmup=warmup, decay_fraction=0.15, least_ratio=least_ratio)


def wsd(warmup: float, decay_fraction: float, least_ratio: float) -> Schedule:
    return Schedule(
        kind="wsd", warmup=warmup, decay_fraction=decay_fraction, least_ratio=least_ratio
    )


def rates(warmup: float, least_ratio: float, steps: int, peak: float = 2.0) -> list[float]:
    schedule = cosine(warmup, least_ratio)
    return [learning_rate(schedule, peak, step, steps) for step in range(steps)]


def test_a_plain_cosine() -> None:
    """Without warm-up: the peak at first, half way down in the middle, and a known curve."""
    found = rates(0.0, 0.0, 8)
    assert found == pytest.approx([1 + math.cos(math.pi * step / 8) for step in range(8)])
    assert found[0] == 2.0
    assert found[4] == pytest.approx(1.0)


def test_warm_up_and_floor() -> None:
    """4 of 20 steps rise by fifths of the peak; then 16 steps of cosine between peak and a
    quarter of it."""
    found = rates(0.2, 0.25, 20)
    assert found[:4] == pytest.approx([2.0 * fifths / 5 for fifths in (1, 2, 3, 4)])
    assert found[4] == 2.0
    assert found[8] == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert found[12] == pytest.approx(0.5 + 1.5 * 0.5)
    assert found[19] == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * 15 / 16)))


@given(warmup=st.floats(0, 0.99), least=st.floats(0, 1), steps=st.integers(1, 300))
def test_up_then_down_within_bounds(warmup: float, least: float, steps: int) -> None:
    """Never 0 before the end, never above the peak, one top: for any fraction and length, a
    step or two included."""
    found = rates(warmup, least, steps)
    assert all(0 < rate <= 2.0 for rate in found)
    top = found.index(max(found))
    assert top <= warmup * steps + 1
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert all(rate >= 2.0 * least * (1 - 1e-12) for rate in found[top:])


def test_a_warm_up_in_steps() -> None:
    """1 and above is a number of steps, as the paper gives it."""
    assert rates(4, 0.25, 20) == rates(0.2, 0.25, 20)
    assert rates(1, 0.0, 8)[:2] == pytest.approx([1.0, 2.0])


def test_warm_up_stable_decay() -> None:
    """SPEC 7: 2 of 20 steps rise by thirds, then the peak, then the last 5 fall by fifths towards
    the floor; a run that goes on from another has no warm-up."""
    schedule = wsd(2, 0.25, 0.5)
    found = [learning_rate(schedule, 3.0, step, 20) for step in range(20)]
    assert schedule.decay_start(20) == 15
    assert found[:2] == pytest.approx([1.0, 2.0])
    assert found[2:16] == [3.0] * 14
    assert found[15:] == pytest.approx([3.0 - 1.5 * fifths / 5 for fifths in range(5)])
    warm = [learning_rate(schedule, 3.0, step, 20, warm=True) for step in range(20)]
    assert warm == [3.0, 3.0, *found[2:]]


@given(
    steps=st.integers(1, 300),
    fraction=st.floats(0.01, 1.0),
    warmup=st.floats(0, 0.5),
    more=st.integers(1, 300),
)
def test_before_the_decay_no_step_knows_the_end(
    steps: int, fraction: float, warmup: float, more: int
) -> None:
    """Whatever follows, warm steps before the decay have one rate, so that a chain of runs is one
    long run at that rate; and the decay has a step at least."""
    schedule = wsd(warmup, fraction, 0.0)
    start = schedule.decay_start(steps)
    assert 0 <= start < steps
    found = [learning_rate(schedule, 2.0, step, steps, warm=True) for step in range(steps)]
    assert found[: start + 1] == [2.0] * (start + 1)
    assert found[start:] == sorted(found[start:], reverse=True)
    assert abs(steps - start - fraction * steps) <= 1
    longer = learning_rate(schedule, 2.0, 0, steps + more, warm=True)
    assert longer == 2.0


@pytest.mark.parametrize(("warmup", "least"), [(-0.1, 0.1), (0.1, 1.5), (0.1, -1.0)])
def test_impossible_schedules_are_an_error(warmup: float, least: float) -> None:
    """A warm-up before the start, or a floor above the peak."""
    with pytest.raises(UserError, match="warmup"):
        cosine(warmup, least)


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_decay_is_a_share_of_the_steps(fraction: float) -> None:
    """None at all would make no decayed model."""
    with pytest.raises(UserError, match="decay_fraction"):
        wsd(0.1, fraction, 0.1)
