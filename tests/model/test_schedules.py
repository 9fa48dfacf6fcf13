"""Learning rates: the closed form, at points that can be reckoned by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.errors import UserError
from boltlm.model.schedules import Schedule, learning_rate


def rates(warmup_fraction: float, least_ratio: float, steps: int, peak: float = 2.0) -> list[float]:
    schedule = Schedule(kind="cosine", warmup_fraction=warmup_fraction, least_ratio=least_ratio)
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


@pytest.mark.parametrize(("warmup", "least"), [(1.0, 0.1), (-0.1, 0.1), (0.1, 1.5), (0.1, -1.0)])
def test_impossible_schedules_are_an_error(warmup: float, least: float) -> None:
    """All warm-up, or a floor above the peak."""
    with pytest.raises(UserError, match="warmup_fraction"):
        Schedule(kind="cosine", warmup_fraction=warmup, least_ratio=least)
