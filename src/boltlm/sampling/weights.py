"""Importance weights in float64, and what they say about a set of draws."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from boltlm.records import Sample
from boltlm.seeds import uniform

BIN = 0.5  # nats, of the histogram of log w
STEP = 0.01  # of the effective sample sizes whose quantiles are taken


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


class Summary:
    """What the draws of many chunks, K at a time, look like; in constant memory."""

    def __init__(
        self,
        groups: Iterable[Sequence[Sample]] = (),
        reference: Mapping[tuple[str, int], str] | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.sums: dict[str, float] = defaultdict(float)
        self.sizes: Counter[int] = Counter()  # chunks by effective sample size, in steps of STEP
        self.bins: Counter[int] = Counter()  # draws by log w, in steps of BIN
        self.add(groups, reference or {})

    def add(
        self, groups: Iterable[Sequence[Sample]], reference: Mapping[tuple[str, int], str]
    ) -> None:
        """`reference`: the data's own latent by (doc_id, chunk), where there is one."""
        counts = self.counts
        for group in groups:
            counts["chunks"] += 1
            self._weigh(np.array([sample.log_weight for sample in group]))
            own = reference.get((group[0].doc_id, group[0].chunk))
            for sample in group:
                counts["samples"] += 1
                counts[sample.finish] += 1
                counts["stop_tokens"] += len(sample.tokens) if sample.finish == "stop" else 0
                counts["kept_tokens"] += len(sample.tokens) if sample.selected else 0
                if own is not None:
                    same = sample.latent == own
                    counts["known"] += 1
                    counts["exact"] += same
                    counts["kept_known"] += sample.selected
                    counts["kept_exact"] += sample.selected and same

    def _weigh(self, log_w_K: np.ndarray) -> None:
        finite = log_w_K[np.isfinite(log_w_K)]
        if not len(finite):
            return
        weights = normalised(log_w_K)
        size = 1 / (weights**2).sum()
        self.counts["alive"] += 1
        self.sizes[round(size / STEP)] += 1
        self.bins.update(np.floor(finite / BIN).astype(int).tolist())
        self.sums["size"] += size
        self.sums["largest"] += weights.max()
        self.sums["spread"] += finite.std()

    def diagnostics(self) -> dict[str, float]:
        """Of the K draws of each chunk: effective sample size 1/Σŵ² (quantiles to STEP), the
        largest ŵ, the spread of log w (nats, standard deviation within a chunk), how draws ended,
        and lengths in tokens."""
        counts, alive = self.counts, self.counts["alive"]
        return {
            "chunks": counts["chunks"],
            "samples": counts["samples"],
            "chunks_without_latent": counts["chunks"] - alive,
            "ess_mean": _ratio(self.sums["size"], alive),
            "ess_p10": self._size_at(0.1),
            "ess_p50": self._size_at(0.5),
            "max_weight_mean": _ratio(self.sums["largest"], alive),
            "log_weight_spread_mean": _ratio(self.sums["spread"], alive),
            "unfinished_fraction": 1 - counts["stop"] / max(counts["samples"], 1),
            **{f"unfinished_{end}": counts[end] for end in ("length", "eos", "special")},
            "latent_tokens_mean": _ratio(counts["stop_tokens"], counts["stop"]),
            "kept_latent_tokens": counts["kept_tokens"],
        }

    def _size_at(self, share: float) -> float:
        """The least effective sample size that at least this share of chunks does not exceed."""
        reached = 0
        for place in sorted(self.sizes):
            reached += self.sizes[place]
            if reached >= share * self.counts["alive"]:
                return round(place * STEP, 2)
        return float("nan")

    def exact_fractions(self) -> dict[str, float]:
        """Share of draws, and of kept latents, that are the data's own latent to the letter, among
        the chunks that have one; nothing where none has."""
        counts = self.counts
        if not counts["known"]:
            return {}
        return {
            "exact_fraction": _ratio(counts["exact"], counts["known"]),
            "exact_fraction_kept": _ratio(counts["kept_exact"], counts["kept_known"]),
        }

    def histogram(self) -> list[tuple[float, float, int]]:
        """(from, to, count) of the finite log w, in bins of BIN nats on a grid that holds 0."""
        if not self.bins:
            return []
        every = range(min(self.bins), max(self.bins) + 1)
        return [(BIN * place, BIN * (place + 1), self.bins[place]) for place in every]


def _ratio(total: float, count: int) -> float:
    return float(total / count) if count else float("nan")
