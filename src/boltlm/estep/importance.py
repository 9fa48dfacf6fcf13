"""Importance weights of sampled latents (docs/method.md, sections 4.1, 4.2 and 5), in float64.

Letters as in docs/method.md: X chunk, C context, Z latent, q proposal, p model, w weight, ŵ weight
normalized within a chunk. All logarithms are natural (nats).

Shapes: G groups (any number of chunks), K samples of a chunk.
"""

import numpy as np

from boltlm.seeds import uniform


def log_importance_weight(
    log_q: float, log_p_latent: float, log_p_text: float, finish: str
) -> float:
    """Eq. (3): log w = log p − log q, in nats.

    `log_q` is log q(Z, EoL | C, X), eq. (1). log p, eq. (2), is the sum of `log_p_latent`,
    log p(Z, EoL | C), and `log_p_text`, log p(X | C, Z). A draw that did not finish with EoL
    (`finish` other than "stop") is not a latent: its weight is 0 (section 4.2), the result −inf.
    """
    return log_p_latent + log_p_text - log_q if finish == "stop" else -np.inf


def normalized_weights(log_w_K: np.ndarray) -> np.ndarray:
    """ŵ = softmax(log w) over the K samples of a chunk, shape (K,), as in eq. (4).

    At least one log w must be finite.
    """
    max_log_w = log_w_K.max()
    assert np.isfinite(max_log_w), "all draws are invalid"
    w_K = np.exp(log_w_K - max_log_w)
    return w_K / w_K.sum()


def select_latent(log_w_K: np.ndarray, seed: int, *key: str | int) -> int | None:
    """Eq. (4): j ~ Categorical(softmax(log w)), by inverting the cumulative distribution at the
    uniform number of (seed, *key). None if all K draws are invalid."""
    if not np.isfinite(log_w_K).any():
        return None
    cumulative_K = normalized_weights(log_w_K).cumsum()
    index = np.searchsorted(cumulative_K, uniform(seed, *key) * cumulative_K[-1], side="right")
    return int(index)


def effective_sample_size(weights_K: np.ndarray) -> float:
    """Eq. (5): ESS = 1 / Σ ŵ², between 1 and K, of normalized weights."""
    return 1 / (weights_K**2).sum()


def iwae_bound(log_w_GK: np.ndarray) -> np.ndarray:
    """Eq. (6): IWAE_K = logsumexp_k(log w_k) − log K in nats, over the last axis.

    Shape (G, K) to (G,), or (K,) to a scalar. Invalid draws count in K with weight 0; the bound is
    −inf where all K draws are invalid.
    """
    max_log_w = log_w_GK.max(-1, keepdims=True)
    shift = np.where(np.isfinite(max_log_w), max_log_w, 0.0)
    with np.errstate(divide="ignore"):
        log_sum = np.log(np.exp(log_w_GK - shift).sum(-1)) + shift[..., 0]
    return log_sum - np.log(log_w_GK.shape[-1])
