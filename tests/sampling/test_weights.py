"""Weights, selection, bounds and diagnostics on numbers small enough for a pencil."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax

from boltlm.records import Sample
from boltlm.sampling.weights import (
    Summary,
    iwae,
    log_weight,
    normalised,
    select,
)
from tests import exact

LOGS = st.floats(-700, 50)


def sample(log_w: float, **changes: object) -> Sample:
    """A draw with a weight; one of −inf is an unfinished one."""
    failed = log_w == -np.inf
    values: dict = {
        "doc_id": "d", "chunk": 0, "sample": 0, "latent": "z", "tokens": (1, 2),
        "finish": "length" if failed else "stop", "log_q": -1.0,
        "log_p_latent": math.nan if failed else -2.0,
        "log_p_text": math.nan if failed else -3.0,
        "log_weight": log_w, "selected": False,
    }  # fmt: skip
    return Sample(**{**values, **changes})


def test_log_weight_is_p_over_q() -> None:
    """The sign of every term: w = p(Z) p(X | Z) / q(Z)."""
    assert log_weight(-1.5, -2.25, -4.0, "stop") == -2.25 - 4.0 + 1.5


@pytest.mark.parametrize("finish", ["length", "eos", "special"])
def test_what_is_no_latent_weighs_nothing(finish: str) -> None:
    """A weight of 0, not NaN and not an exception, keeps the bound valid."""
    assert log_weight(-1.0, math.nan, math.nan, finish) == -np.inf


@given(st.lists(LOGS, min_size=1, max_size=6))
def test_normalised_is_a_softmax(logs: list[float]) -> None:
    """Weights of e⁻⁷⁰⁰ underflow unless the largest is taken out first."""
    np.testing.assert_allclose(normalised(np.array(logs)), softmax(logs), atol=1e-12)


def test_normalised_leaves_failed_draws_out() -> None:
    """−inf beside finite weights is 0 exactly."""
    np.testing.assert_allclose(normalised(np.array([-np.inf, -5.0, -5.0])), [0, 0.5, 0.5])


@pytest.mark.parametrize(
    "logs", [[0.0, 1.0, -1.0, 0.5], [-800.0, -801.0], [-np.inf, 2.0, 1.0], [3.0, 3.0, -np.inf]]
)
def test_selection_follows_the_weights(logs: list[float]) -> None:
    """SPEC 4: j ~ Categorical(softmax(log w)), χ² over 8,000 chunks; a failed draw never."""
    log_w_K = np.array(logs)
    count = 8000
    kept = [select(log_w_K, 1, "select", "tests", "doc", chunk) for chunk in range(count)]
    seen = np.bincount(np.array(kept, dtype=int), minlength=len(logs))
    alive = np.isfinite(log_w_K)
    assert seen[~alive].sum() == 0
    expected = softmax(log_w_K)[alive] * count
    assert exact.chi2(seen[alive], expected) > 1e-4


def test_selection_is_a_function_of_seed_and_key() -> None:
    """The same chunk keeps the same draw, whenever and wherever it is asked; each part of the
    key counts."""
    log_w_K = np.zeros(4)
    keys = [("select", purpose, doc, n) for purpose in "ab" for doc in "cd" for n in range(30)]
    first = [select(log_w_K, 1, *key) for key in keys]
    assert [select(log_w_K, 1, *key) for key in keys[::-1]] == first[::-1]
    assert [select(log_w_K, 2, *key) for key in keys] != first
    quarters = [tuple(first[i : i + 30]) for i in range(0, len(keys), 30)]
    assert len(set(quarters)) == 4


def test_nothing_is_selected_where_all_failed() -> None:
    """SPEC 4: such a chunk is trained without a latent, not with a failed one."""
    assert select(np.array([-np.inf, -np.inf]), 1, "k") is None


def test_one_draw_is_kept() -> None:
    """With K = 1 the kept sample is the drawn one."""
    assert all(select(np.array([-900.0 + n]), 1, n) == 0 for n in range(20))


def test_iwae_by_hand() -> None:
    """log of the mean weight: log((1 + 3) / 2) = log 2, and K = 1 is the weight itself."""
    assert iwae(np.log([1.0, 3.0])) == pytest.approx(math.log(2))
    assert iwae(np.log([1.0, 3.0, 5.0, 7.0])) == pytest.approx(math.log(4))
    assert iwae(np.array([-123.5])) == pytest.approx(-123.5)


def test_iwae_counts_failed_draws_as_weight_0() -> None:
    """Leaving them out of K would raise the bound above log p(X)."""
    assert iwae(np.array([math.log(6.0), -np.inf])) == pytest.approx(math.log(3))
    assert iwae(np.array([-np.inf, -np.inf])) == -np.inf
    both = iwae(np.array([[math.log(6.0), -np.inf], [-np.inf, -np.inf]]))
    np.testing.assert_allclose(both, [math.log(3), -np.inf])


@given(st.lists(LOGS | st.just(-np.inf), min_size=1, max_size=6))
def test_iwae_is_logsumexp_minus_log_k(logs: list[float]) -> None:
    """SPEC 5, without overflow or underflow at any size of weight."""
    wanted = logsumexp(logs) - math.log(len(logs))
    np.testing.assert_allclose(iwae(np.array([logs, logs])), [wanted, wanted], atol=1e-9)


def test_diagnostics_by_hand() -> None:
    """Three chunks with K = 2: even weights, one of three to one, and one where all failed."""
    even = [sample(-4.0, tokens=(1,)), sample(-4.0, tokens=(1, 2, 3), selected=True)]
    uneven = [sample(math.log(3.0), selected=True), sample(0.0, tokens=())]
    failed = [sample(-np.inf), sample(-np.inf, finish="special")]
    found = Summary([even, uneven, failed]).diagnostics()
    ess = [2.0, 1 / (0.75**2 + 0.25**2)]
    assert found == pytest.approx({
        "chunks": 3,
        "samples": 6,
        "chunks_without_latent": 1,
        "ess_mean": sum(ess) / 2,
        "ess_p10": 1.6,
        "ess_p50": 1.6,
        "max_weight_mean": (0.5 + 0.75) / 2,
        "log_weight_spread_mean": (0 + math.log(3.0) / 2) / 2,
        "unfinished_fraction": 2 / 6,
        "unfinished_length": 1,
        "unfinished_eos": 0,
        "unfinished_special": 1,
        "latent_tokens_mean": (1 + 3 + 2 + 0) / 4,
        "kept_latent_tokens": 3 + 2,
    })  # fmt: skip


def test_quantiles_of_effective_sample_sizes() -> None:
    """The least size that so many chunks do not exceed: of ten chunks the first, and the fifth."""
    groups = [[sample(0.0), sample(-0.3 * i)] for i in range(10)]
    sizes = sorted((1 + np.exp(-0.3 * i)) ** 2 / (1 + np.exp(-0.6 * i)) for i in range(10))
    found = Summary(groups).diagnostics()
    assert found["ess_p10"] == pytest.approx(sizes[0], abs=0.006)
    assert found["ess_p50"] == pytest.approx(sizes[4], abs=0.006)
    assert sizes[0] + 0.02 < sizes[4] < sizes[-1] - 0.02


def test_diagnostics_of_a_partly_failed_chunk() -> None:
    """A failed draw has no weight to share, and no place in the spread of log w."""
    found = Summary([[sample(-7.0), sample(-np.inf, finish="eos")]]).diagnostics()
    assert found["ess_mean"] == 1
    assert found["max_weight_mean"] == 1
    assert found["log_weight_spread_mean"] == 0
    assert found["unfinished_eos"] == 1
    assert found["unfinished_fraction"] == 0.5


def test_diagnostics_where_everything_failed() -> None:
    """A model that never ends a latent must still give a report, not a crash."""
    found = Summary([[sample(-np.inf)]]).diagnostics()
    assert found["chunks_without_latent"] == 1
    assert math.isnan(found["ess_mean"])
    assert found["unfinished_fraction"] == 1


def test_exact_fractions_by_hand() -> None:
    """Shares of draws, and of kept ones, that are the data's own latent, where it has one."""
    reference = {("d", 0): "right", ("d", 1): "other"}
    groups = [
        [sample(0, latent="right", selected=True), sample(0, latent="wrong")],
        [sample(0, chunk=1, latent="right", selected=True), sample(0, chunk=1, latent="other")],
        [sample(0, chunk=2, latent="right", selected=True), sample(0, chunk=2, latent="right")],
    ]
    found = Summary(groups, reference).exact_fractions()
    assert found == {"exact_fraction": 2 / 4, "exact_fraction_kept": 1 / 2}
    assert Summary(groups).exact_fractions() == {}


def test_histogram_by_hand() -> None:
    """Bins of half a nat, edges on the lower side, empty ones within, failures left out."""
    groups = [[sample(-0.75), sample(-0.5)], [sample(0.0), sample(0.49), sample(-np.inf)]]
    assert Summary([*groups, [sample(1.2)]]).histogram() == [
        (-1.0, -0.5, 1),
        (-0.5, 0.0, 1),
        (0.0, 0.5, 2),
        (0.5, 1.0, 0),
        (1.0, 1.5, 1),
    ]
    assert Summary([[sample(-np.inf)]]).histogram() == []
