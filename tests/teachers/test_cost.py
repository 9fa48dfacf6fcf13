"""The budget is a hard limit."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.errors import UserError
from boltlm.param_values import build
from boltlm.teachers.cost import CostBudget, Prices

# A request: the most that it can cost, and the fraction of it that it does cost; None: its answer
# is lost, and it counts with the most. Beside it, which of the requests in flight returns next.
REQUESTS = st.lists(
    st.tuples(st.floats(1e-6, 1.0), st.none() | st.floats(0, 1), st.integers(0, 100)), max_size=60
)


def run_schedule(
    budget: CostBudget, requests: Sequence[tuple[float, float | None, int]], concurrency: int
) -> list[float]:
    """Send requests as the client does, with random returns. Returns what was spent by then."""
    in_flight: list[tuple[float, float | None]] = []
    spent: list[float] = []

    def settle(index: int) -> None:
        max_usd, fraction = in_flight.pop(index % len(in_flight))
        cost = max_usd if fraction is None else max_usd * fraction
        budget.settle(max_usd, cost, estimated=fraction is None)
        spent.append(budget.spent)

    for max_usd, fraction, order in requests:
        while len(in_flight) >= concurrency:
            settle(order)
        while not budget.reserve(max_usd):
            if not budget.fits_alone(max_usd):
                break
            assert in_flight, "nothing is in flight, yet the request has to wait"
            settle(order)
        else:
            in_flight.append((max_usd, fraction))
    while in_flight:
        settle(0)
    return spent


@given(REQUESTS, st.floats(0, 5), st.integers(1, 12))
def test_no_schedule_spends_more_than_the_limit(
    requests: list[tuple[float, float | None, int]], limit: float, concurrency: int
) -> None:
    """Whatever the requests cost, in whichever order they return, and whichever are lost."""
    budget = CostBudget(limit)
    assert all(spent <= limit + 1e-9 for spent in run_schedule(budget, requests, concurrency))
    assert budget.reserved == 0
    assert 0 <= budget.estimated <= budget.spent + 1e-9


@given(REQUESTS, st.floats(1, 5), st.integers(1, 12), st.floats(1, 4))
def test_a_server_that_charges_more_than_the_most_is_noticed(
    requests: list[tuple[float, float | None, int]], limit: float, concurrency: int, factor: float
) -> None:
    """It can exceed the limit only by the excess of what was in flight when that was noticed."""
    budget = CostBudget(limit)
    dear = [(max_usd, factor, order) for max_usd, _, order in requests]
    most = max((max_usd for max_usd, _, _ in requests), default=0.0)
    for spent in run_schedule(budget, dear, concurrency):
        assert spent <= limit + concurrency * most * (factor - 1) + 1e-9


def test_money_is_left_to_the_last_request_that_fits() -> None:
    """A reservation delays a request, but does not end the run."""
    budget = CostBudget(1.0)
    assert budget.reserve(0.6)
    assert not budget.reserve(0.6)
    assert budget.fits_alone(0.6)
    budget.settle(0.6, 0.2)
    assert budget.reserve(0.6)
    budget.settle(0.6, 0.6)
    assert not budget.fits_alone(0.6)
    message = str(budget.exceeded_error("teachers.t", 0.3))
    assert "stopped at $0.8000" in message
    assert f"could cost ${0.3 * budget.ratio:.6f} and exceed max_cost_usd" in message


@pytest.mark.parametrize("name", ["input_usd", "output_usd", "batch_factor"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_prices_that_are_none_are_refused(name: str, value: float) -> None:
    """A negative price would make the budget grow, one that is no number would disable it."""
    prices = {"input_usd": 0.15, "output_usd": 0.6, "batch_factor": 0.5, name: value}
    with pytest.raises(UserError, match=rf"prices\.{name} must be (0 or more|a finite number)"):
        build(Prices, {**prices, "as_of": "2025-01-01"}, "prices")
