"""Ratios of sums with cluster-robust standard errors (docs/method.md, section 5)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class RatioEstimate(NamedTuple):
    """A ratio of sums, its standard error, and the number of clusters behind it."""

    value: float
    standard_error: float
    clusters: int


def ratio_estimate(
    numerators: np.ndarray, denominators: np.ndarray, clusters: Sequence[str]
) -> RatioEstimate:
    """R = Σ a / Σ b over rows (chunks, documents or questions), with the error of eq. (9).

    `clusters` names the cluster of each row; rows of different clusters are independent. Eq. (9):
    SE² = G / (G − 1) · Σ_g (a_g − R b_g)² / (Σ b)², with a_g and b_g the sums over cluster g. R is
    NaN where Σ b is 0, the standard error is NaN for a single cluster.
    """
    total = denominators.sum()
    names, cluster_of_row = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    count = len(names)
    if total == 0:
        return RatioEstimate(float("nan"), float("nan"), count)
    ratio = numerators.sum() / total
    if count < 2:
        return RatioEstimate(float(ratio), float("nan"), count)
    residuals_G = np.bincount(cluster_of_row, numerators - ratio * denominators)
    error = np.sqrt(count / (count - 1) * (residuals_G**2).sum()) / total
    return RatioEstimate(float(ratio), float(error), count)


def mean_estimate(values: np.ndarray, clusters: Sequence[str]) -> RatioEstimate:
    """The mean of rows with equal weights: `ratio_estimate` with every denominator 1."""
    return ratio_estimate(values, np.ones(len(values)), clusters)
