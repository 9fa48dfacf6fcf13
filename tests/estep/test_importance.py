"""Weights, selection, bounds and diagnostics on examples that can be computed by hand."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax

from boltlm.estep.config import EStepSettings
from boltlm.estep.diagnostics import MAX_HISTOGRAM_BINS, WeightDiagnostics
from boltlm.estep.importance import iwae_bound, normalized_weights, select_latent
from boltlm.estep.run import _warn_of_forced_draws
from boltlm.params import build_settings, load
from boltlm.records import Sample
from tests import reference, tiny

LOG_WEIGHTS = st.floats(-700, 50)


def sample(log_w: float, **changes: object) -> Sample:
    """A draw with a weight."""
    values: dict = {
        "doc_id": "d", "chunk": 0, "sample": 0, "latent": "z", "tokens": (1, 2), "finish": "stop",
        "log_q": -1.0, "log_allowed": 0.0, "log_p_latent": -2.0, "log_p_text": -3.0,
        "log_weight": log_w, "selected": False,
    }  # fmt: skip
    return Sample(**{**values, **changes})


@given(st.lists(LOG_WEIGHTS, min_size=1, max_size=6))
def test_normalized_weights_are_a_softmax(logs: list[float]) -> None:
    """Weights of e⁻⁷⁰⁰ underflow unless the largest is factored out first."""
    np.testing.assert_allclose(normalized_weights(np.array(logs)), softmax(logs), atol=1e-12)


@pytest.mark.parametrize("logs", [[0.0, 1.0, -1.0, 0.5], [-800.0, -801.0], [0.0, 0.0, 0.0]])
def test_selection_follows_the_weights(logs: list[float]) -> None:
    """Eq. (4): j ~ Categorical(softmax(log w)), χ² test over 8,000 chunks."""
    log_w_K = np.array(logs)
    count = 8000
    selected = [select_latent(log_w_K, 1, "select", "tests", "doc", n) for n in range(count)]
    counts_K = np.bincount(selected, minlength=len(logs))
    assert reference.chi2(counts_K, softmax(log_w_K) * count) > 1e-4


def test_selection_is_a_function_of_seed_and_key() -> None:
    """A chunk has the same selection in whatever order chunks are processed; each part of the key
    matters."""
    log_w_K = np.zeros(4)
    keys = [("select", purpose, doc, n) for purpose in "ab" for doc in "cd" for n in range(30)]
    first = [select_latent(log_w_K, 1, *key) for key in keys]
    assert [select_latent(log_w_K, 1, *key) for key in keys[::-1]] == first[::-1]
    assert [select_latent(log_w_K, 2, *key) for key in keys] != first
    by_purpose_and_doc = [tuple(first[i : i + 30]) for i in range(0, len(keys), 30)]
    assert len(set(by_purpose_and_doc)) == 4


def test_a_single_draw_is_selected() -> None:
    """With K = 1 the selected sample is the drawn one."""
    assert all(select_latent(np.array([-900.0 + n]), 1, n) == 0 for n in range(20))


def test_iwae_by_hand() -> None:
    """Eq. (6) is the log of the mean weight: log((1 + 3) / 2) = log 2; K = 1 gives the weight."""
    assert iwae_bound(np.log([1.0, 3.0])) == pytest.approx(math.log(2))
    assert iwae_bound(np.log([1.0, 3.0, 5.0, 7.0])) == pytest.approx(math.log(4))
    assert iwae_bound(np.array([-123.5])) == pytest.approx(-123.5)


@given(st.lists(LOG_WEIGHTS, min_size=1, max_size=6))
def test_iwae_is_logsumexp_minus_log_k(logs: list[float]) -> None:
    """Eq. (6), without overflow or underflow for weights of any size."""
    expected = logsumexp(logs) - math.log(len(logs))
    np.testing.assert_allclose(iwae_bound(np.array([logs, logs])), [expected, expected], atol=1e-9)


def test_diagnostics_by_hand() -> None:
    """Two chunks with K = 2: equal weights, and weights of three to one with equal latents."""
    equal = [sample(-4.0, tokens=(1,)), sample(-4.0, tokens=(1, 2, 3), selected=True)]
    unequal = [
        sample(math.log(3.0), selected=True, finish="length", log_allowed=math.log(0.5)),
        sample(0.0, log_allowed=math.log(0.7)),
    ]
    metrics = WeightDiagnostics([equal, unequal]).diagnostics()
    ess = [2.0, 1 / (0.75**2 + 0.25**2)]
    assert metrics == pytest.approx({
        "chunks": 2,
        "samples": 4,
        "candidates": 4,
        "selected_earlier_fraction": 0.0,
        "ess_mean": sum(ess) / 2,
        "ess_p10": 1.6,
        "ess_p50": 1.6,
        "max_weight_mean": (0.5 + 0.75) / 2,
        "log_weight_std_mean": (0 + math.log(3.0) / 2) / 2,
        "distinct_latents_mean": (2 + 1) / 2,
        "forced_fraction": 1 / 4,
        "masked_mass": 1 - (1 + 1 + 0.5 + 0.7) / 4,
        "latent_tokens_mean": (1 + 3 + 2 + 2) / 4,
        "selected_latent_tokens": 3 + 2,
    })  # fmt: skip


def test_quantiles_of_effective_sample_sizes() -> None:
    """The smallest size that the given fraction of chunks do not exceed: of ten chunks, the first
    and the fifth."""
    groups = [[sample(0.0), sample(-0.3 * i)] for i in range(10)]
    sizes = sorted((1 + np.exp(-0.3 * i)) ** 2 / (1 + np.exp(-0.6 * i)) for i in range(10))
    metrics = WeightDiagnostics(groups).diagnostics()
    assert metrics["ess_p10"] == pytest.approx(sizes[0], abs=0.006)
    assert metrics["ess_p50"] == pytest.approx(sizes[4], abs=0.006)
    assert sizes[0] + 0.02 < sizes[4] < sizes[-1] - 0.02


def test_an_unknown_masked_mass_is_nan() -> None:
    """A sampler that cannot know it must not be reported as one that masks nothing."""
    metrics = WeightDiagnostics([[sample(0.0), sample(0.0, log_allowed=math.nan)]]).diagnostics()
    assert math.isnan(metrics["masked_mass"])
    assert metrics["forced_fraction"] == 0


def test_exact_match_by_hand() -> None:
    """Fractions of draws, and of selected draws, that equal the reference latent, or have its
    numbers in its order, over the chunks that have one."""
    reference_latents = {("d", 0): "right 1 2", ("d", 1): "other"}
    groups = [
        [
            sample(0, latent="right 1 2", selected=True),
            sample(0, latent="1 to 2"),
            sample(0, latent="right 2 1"),
            sample(0, latent="right 12"),
        ],
        [sample(0, chunk=1, latent="right", selected=True), sample(0, chunk=1, latent="other")],
        [sample(0, chunk=2, latent="right", selected=True), sample(0, chunk=2, latent="right")],
    ]
    metrics = WeightDiagnostics(groups, reference_latents).exact_match_metrics()
    assert metrics == {
        "exact_match": 2 / 6,
        "exact_match_selected": 1 / 2,
        "numbers_match": 4 / 6,
        "numbers_match_selected": 2 / 2,
    }
    assert WeightDiagnostics(groups).exact_match_metrics() == {}


def test_histogram_by_hand() -> None:
    """Bins of half a nat that include their lower edge; empty bins in between are listed."""
    groups = [[sample(-0.75), sample(-0.5)], [sample(0.0), sample(0.49)]]
    assert WeightDiagnostics([*groups, [sample(1.2)]]).histogram() == [
        (-1.0, -0.5, 1),
        (-0.5, 0.0, 1),
        (0.0, 0.5, 2),
        (0.5, 1.0, 0),
        (1.0, 1.5, 1),
    ]
    assert WeightDiagnostics().histogram() == []


def test_diagnostics_of_parts_add_up() -> None:
    """Parts that were stored as JSON and merged are the diagnostics of the whole."""
    groups = [
        [sample(-0.75, latent="1", selected=True), sample(-0.5, latent="2")],
        [sample(2.0, chunk=1, latent="3", selected=True), sample(0.49, chunk=1, latent="4")],
        [sample(0.0, chunk=2, latent="5", log_allowed=-0.5), sample(1.0, chunk=2, latent="6")],
    ]
    references = {("d", 0): "1", ("d", 1): "4"}
    merged = WeightDiagnostics()
    for group in groups:
        state = json.dumps(WeightDiagnostics([group], references).to_json())
        merged.merge(WeightDiagnostics.from_json(json.loads(state)))
    whole = WeightDiagnostics(groups, references)
    assert merged.diagnostics() == pytest.approx(whole.diagnostics(), rel=1e-12)
    assert merged.exact_match_metrics() == whole.exact_match_metrics()
    assert merged.histogram() == whole.histogram()


def test_the_bins_of_a_wide_histogram_are_wider_and_few() -> None:
    """4000 nats in bins of 16: half a nat would be 8000 bins. No draw is lost."""
    groups = [[sample(float(value))] for value in range(-4000, 0, 8)]
    bins = WeightDiagnostics(groups).histogram()
    assert len(bins) <= MAX_HISTOGRAM_BINS
    assert {high - low for low, high, _ in bins} == {16.0}
    assert sum(count for _, _, count in bins) == 500
    assert bins[0] == (-4000.0, -3984.0, 2)


def test_latents_most_of_which_are_cut_are_a_loud_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = build_settings(EStepSettings, load(tiny.ROOT / "params.yaml"), name="em1")
    _warn_of_forced_draws(settings, 0.5)
    assert capsys.readouterr().err == ""
    _warn_of_forced_draws(settings, 0.98)
    error = capsys.readouterr().err
    assert error.startswith("warning: latents.em1: 98% of the latents were cut")
    assert "max_latent_tokens (48)" in error
