"""Importance weights of sampled latents (docs/method.md, sections 4.1 and 5), in float64.

Letters as in docs/method.md: X chunk, C context, Z latent, q proposal, p model, w weight, ŵ weight
normalized within a chunk. All logarithms are natural (nats).

Shapes: G groups (any number of chunks), K samples of a chunk.
"""

import numpy as np

from boltlm.seeds import uniform


def normalized_weights(log_w_K: np.ndarray) -> np.ndarray:
    """ŵ = softmax(log w) over the K samples of a chunk, shape (K,), as in eq. (4)."""
    w_K = np.exp(log_w_K - log_w_K.max())
    return w_K / w_K.sum()


def select_latent(log_w_K: np.ndarray, seed: int, *key: str | int) -> int:
    """Eq. (4): j ~ Categorical(softmax(log w)), by inverting the cumulative distribution at the
    uniform number of (seed, *key)."""
    cumulative_K = normalized_weights(log_w_K).cumsum()
    index = np.searchsorted(cumulative_K, uniform(seed, *key) * cumulative_K[-1], side="right")
    return int(index)


def systematic_resample(weights_K: np.ndarray, point: float) -> np.ndarray:
    """Indices, shape (K,), in which k occurs K ŵ_k times on average over the uniform `point` in
    [0, 1), and never more than one time off that. `weights_K`: normalized."""
    cumulative_K = weights_K.cumsum()
    positions_K = (point + np.arange(len(weights_K))) / len(weights_K) * cumulative_K[-1]
    indices_K = np.searchsorted(cumulative_K, positions_K, side="right")
    return np.minimum(indices_K, len(weights_K) - 1)


def effective_sample_size(weights_K: np.ndarray) -> float:
    """Eq. (5): ESS = 1 / Σ ŵ², between 1 and K, of normalized weights."""
    return 1 / (weights_K**2).sum()


def iwae_bound(log_w_GK: np.ndarray) -> np.ndarray:
    """Eq. (6): IWAE_K = logsumexp_k(log w_k) − log K in nats, over the last axis.

    Shape (G, K) to (G,), or (K,) to a scalar.
    """
    return np.logaddexp.reduce(log_w_GK, axis=-1) - np.log(log_w_GK.shape[-1])
