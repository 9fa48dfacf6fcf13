"""Importance weights in float64, and what they say about a set of draws."""

from collections.abc import Mapping, Sequence

import numpy as np

from boltlm.records import Sample
from boltlm.seeds import uniform

BIN = 0.5  # nats, of the histogram of log w


def log_weight(log_q: float, log_p_latent: float, log_p_text: float, finish: str) -> float:
    """log w = log p(Z, EoL) + log p(X | Z) − log q(Z, EoL | X); −inf for what is no latent."""
    return log_p_latent + log_p_text - log_q if finish == "stop" else -np.inf


def normalised(log_w_K: np.ndarray) -> np.ndarray:
    """softmax over the K draws of a chunk. At least one weight must be above 0."""
    top = log_w_K.max()
    assert np.isfinite(top), "all draws failed"
    weights = np.exp(log_w_K - top)
    return weights / weights.sum()


def select(log_w_K: np.ndarray, seed: int, *key: str | int) -> int | None:
    """j ~ Categorical(softmax(log w)), or None where every draw failed (SPEC section 4)."""
    if not np.isfinite(log_w_K).any():
        return None
    cumulated = normalised(log_w_K).cumsum()
    place = np.searchsorted(cumulated, uniform(seed, *key) * cumulated[-1], side="right")
    return int(place)


def iwae(log_w_GK: np.ndarray) -> np.ndarray:
    """IWAE_K = logsumexp_k(log w_k) − log K along the last axis; −inf where all draws failed."""
    top = log_w_GK.max(-1, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(log_w_GK - safe).sum(-1)) + safe[..., 0]
    return total - np.log(log_w_GK.shape[-1])


def diagnostics(groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Of the K draws of each chunk: effective sample size 1/Σŵ², the largest ŵ, the spread of
    log w (nats, standard deviation within a chunk), how draws ended, and lengths in tokens."""
    logs = [np.array([sample.log_weight for sample in group]) for group in groups]
    alive = [log_w for log_w in logs if np.isfinite(log_w).any()]
    sizes = [1 / (normalised(log_w) ** 2).sum() for log_w in alive]
    spreads = [log_w[np.isfinite(log_w)].std() for log_w in alive]
    drawn = [sample for group in groups for sample in group]
    kept = [sample for sample in drawn if sample.selected]
    ended = [sample.finish for sample in drawn]
    return {
        "chunks": len(groups),
        "samples": len(drawn),
        "chunks_without_latent": len(groups) - len(alive),
        "ess_mean": _mean(sizes),
        "ess_p10": float(np.quantile(sizes, 0.1)) if sizes else float("nan"),
        "ess_p50": float(np.quantile(sizes, 0.5)) if sizes else float("nan"),
        "max_weight_mean": _mean([normalised(log_w).max() for log_w in alive]),
        "log_weight_spread_mean": _mean(spreads),
        "unfinished_fraction": 1 - ended.count("stop") / max(len(ended), 1),
        **{f"unfinished_{end}": ended.count(end) for end in ("length", "eos", "special")},
        "latent_tokens_mean": _mean([len(s.tokens) for s in drawn if s.finish == "stop"]),
        "kept_latent_tokens": sum(len(s.tokens) for s in kept),
    }


def exact_fractions(
    groups: Sequence[Sequence[Sample]], reference: Mapping[tuple[str, int], str]
) -> dict[str, float]:
    """Share of draws, and of kept latents, that are the data's own latent to the letter, among
    the chunks that have one; nothing where none has."""
    drawn = [s for group in groups for s in group if (s.doc_id, s.chunk) in reference]
    if not drawn:
        return {}
    exact = [sample.latent == reference[sample.doc_id, sample.chunk] for sample in drawn]
    kept = [same for same, sample in zip(exact, drawn, strict=True) if sample.selected]
    return {"exact_fraction": _mean(exact), "exact_fraction_kept": _mean(kept)}


def histogram(groups: Sequence[Sequence[Sample]]) -> list[tuple[float, float, int]]:
    """(from, to, count) of the finite log w, in bins of BIN nats on a grid that holds 0."""
    logs = np.array([s.log_weight for group in groups for s in group])
    places, counts = np.unique(np.floor(logs[np.isfinite(logs)] / BIN), return_counts=True)
    found = dict(zip(places.astype(int).tolist(), counts.tolist(), strict=True))
    if not found:
        return []
    every = range(min(found), max(found) + 1)
    return [(BIN * place, BIN * (place + 1), found.get(place, 0)) for place in every]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
