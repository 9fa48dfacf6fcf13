"""Cluster-robust standard errors against formulas written out and against a bootstrap."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.evaluation.clustered_errors import mean_estimate, ratio_estimate


def delta_error(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The delta method's standard error of Σ a / Σ b over independent rows."""
    n, ratio = len(numerators), sum(numerators) / sum(denominators)
    squares = sum((a - ratio * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    return math.sqrt(n / (n - 1) * squares) / sum(denominators)


@given(
    numerators=st.lists(st.floats(-50, 0), min_size=2, max_size=12),
    scale=st.floats(0.1, 10),
)
def test_rows_that_are_their_own_clusters(numerators: list[float], scale: float) -> None:
    """Then the error is the delta method's over rows. R is Σ a / Σ b and not a mean of ratios; the
    error has its unit and does not depend on the order of the rows."""
    a, b = np.array(numerators), np.arange(1.0, len(numerators) + 1)
    names = [f"c{index}" for index in range(len(a))]
    ratio, error, clusters = ratio_estimate(a, b, names)
    assert (ratio, clusters) == (pytest.approx(sum(numerators) / b.sum()), len(a))
    assert error == pytest.approx(delta_error(numerators, b.tolist()), abs=1e-12)
    scaled = ratio_estimate(scale * a, b, names)
    assert scaled[:2] == pytest.approx((scale * ratio, scale * error), abs=1e-9)
    reversed_rows = ratio_estimate(a[::-1], b[::-1], names[::-1])
    assert reversed_rows[:2] == pytest.approx((ratio, error), abs=1e-9)


def clustered_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numerators, denominators and clusters of about 1200 rows in 300 clusters of 1 to 7 rows,
    which share most of their noise."""
    rng = np.random.default_rng(3)
    cluster = np.repeat(np.arange(300), rng.integers(1, 8, size=300))
    b = rng.integers(5, 200, size=len(cluster)).astype(float)
    shared = rng.normal(2.0, 0.3, size=300)[cluster]
    return -b * shared - rng.normal(0, 8, size=len(cluster)), b, cluster


def test_the_error_agrees_with_a_bootstrap_over_clusters() -> None:
    """Whole clusters are drawn with replacement. The standard deviation of 4000 resamples has a
    relative error of 1/√8000 ≈ 1 %, and that of 300 clusters as an estimate of the true one is in
    both; 5 % leaves room for the delta method. An error over rows is far too small."""
    a, b, cluster = clustered_rows()
    _, error, clusters = ratio_estimate(a, b, cluster.astype(str).tolist())
    assert clusters == 300
    a_G, b_G = np.bincount(cluster, a), np.bincount(cluster, b)
    picks = np.random.default_rng(5).integers(0, 300, size=(4000, 300))
    resampled = a_G[picks].sum(1) / b_G[picks].sum(1)
    assert error == pytest.approx(resampled.std(ddof=1), rel=0.05)
    assert error == pytest.approx(delta_error(a_G.tolist(), b_G.tolist()))
    assert error > 1.7 * delta_error(a.tolist(), b.tolist())


def test_copies_within_a_cluster_change_nothing() -> None:
    """Asking every question of every cluster three times gives no more certainty."""
    a, b, cluster = clustered_rows()
    once = ratio_estimate(a, b, cluster.astype(str).tolist())
    names = np.repeat(cluster, 3).astype(str).tolist()
    thrice = ratio_estimate(np.repeat(a, 3), np.repeat(b, 3), names)
    assert thrice == pytest.approx(once)
    rows = np.array([f"row{index}" for index in range(3 * len(a))])
    independent = ratio_estimate(np.repeat(a, 3), np.repeat(b, 3), rows.tolist())
    assert independent.standard_error < 0.6 * once.standard_error


def test_a_mean_is_a_ratio_with_equal_denominators() -> None:
    """With clusters of their own it is the mean with s/√n; (1, 1, 0) and (0) are clusters below."""
    values = np.array([1.0, 1.0, 0.0, 0.0])
    mean, error, _ = mean_estimate(values, list("abcd"))
    assert (mean, error) == (0.5, pytest.approx(values.std(ddof=1) / 2))
    # Residual sums 0.5 + 0.5 − 0.5 and −0.5; G/(G−1) = 2.
    assert mean_estimate(values, list("aaab")).standard_error == pytest.approx(
        math.sqrt(2 * (0.5**2 + 0.5**2)) / 4
    )


def test_one_cluster_has_no_error_and_nothing_has_no_ratio() -> None:
    """NaN and not 0: a single cluster says nothing about the spread, however many rows it has."""
    ratio, error, clusters = ratio_estimate(np.array([-6.0, -3.0]), np.array([3.0, 1.5]), ["a"] * 2)
    assert (ratio, clusters) == (-2.0, 1)
    assert math.isnan(error)
    assert np.isnan(ratio_estimate(np.zeros(3), np.zeros(3), list("abc"))[:2]).all()
