"""Diagnostics of importance weights over a corpus (docs/method.md, section 4.3).

Shapes: K samples of a chunk.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from boltlm.estep.importance import effective_sample_size, iwae_bound, normalized_weights
from boltlm.records import Sample

HISTOGRAM_BIN = 0.5  # least bin width of the histogram of log w, nats
MAX_HISTOGRAM_BINS = 400  # bins are twice as wide until there are no more
UNUSABLE_FRACTION = 0.5  # of draws that are cut at the limit; above it, latents are unusable
OWN_PROPOSAL = ("proposal", "particle")  # sources of the draws from the present model's q′
EARLIER = ("previous", "retained")  # sources of the latents that are reused
NUMBER = re.compile(r"\d+")
ESS_RESOLUTION = 0.01  # effective sample sizes are rounded to this before quantiles are taken


class WeightDiagnostics:
    """Accumulates statistics over the K samples of many chunks in constant memory."""

    def __init__(
        self,
        groups: Iterable[Sequence[Sample]] = (),
        reference: Mapping[tuple[str, int], str] | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.sums: dict[str, float] = defaultdict(float)
        # Chunks by effective sample size in units of ESS_RESOLUTION, and samples by log w in units
        # of HISTOGRAM_BIN.
        self.ess_counts: Counter[int] = Counter()
        self.bin_counts: Counter[int] = Counter()
        self.add(groups, reference or {})

    def add(
        self, groups: Iterable[Sequence[Sample]], reference: Mapping[tuple[str, int], str]
    ) -> None:
        """Add chunks, each with its K samples. `reference`: the latents that the data set itself
        provides, by (doc_id, chunk)."""
        counts = self.counts
        for group in groups:
            counts["chunks"] += 1
            counts["candidates"] += len(group)
            counts["distinct"] += len({sample.tokens for sample in group})
            self._add_weights(group)
            reference_latent = reference.get((group[0].doc_id, group[0].chunk))
            for sample in group:
                counts["selected_tokens"] += len(sample.tokens) if sample.selected else 0
                counts["selected_earlier"] += sample.selected and sample.source in EARLIER
                if sample.source in OWN_PROPOSAL:
                    counts["samples"] += 1
                    counts[sample.finish] += 1
                    counts["tokens"] += len(sample.tokens)
                    self.sums["allowed"] += math.exp(sample.log_allowed)
                if reference_latent is not None:
                    self._add_match(sample, reference_latent)

    def merge(self, other: "WeightDiagnostics") -> None:
        """Add the chunks of `other`."""
        self.counts.update(other.counts)
        self.ess_counts.update(other.ess_counts)
        self.bin_counts.update(other.bin_counts)
        for name, value in other.sums.items():
            self.sums[name] += value

    def to_json(self) -> dict[str, dict[str, float]]:
        """The state in a form that JSON keeps exactly."""
        return {
            "counts": dict(self.counts),
            "sums": dict(self.sums),
            "ess_counts": {str(index): count for index, count in self.ess_counts.items()},
            "bin_counts": {str(index): count for index, count in self.bin_counts.items()},
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Mapping[str, Any]]) -> "WeightDiagnostics":
        """The diagnostics whose `to_json` is `state`."""
        diagnostics = cls()
        diagnostics.counts.update(state["counts"])
        diagnostics.sums.update(state["sums"])
        diagnostics.ess_counts.update({int(i): n for i, n in state["ess_counts"].items()})
        diagnostics.bin_counts.update({int(i): n for i, n in state["bin_counts"].items()})
        return diagnostics

    def _add_match(self, sample: Sample, reference_latent: str) -> None:
        counts, is_match = self.counts, sample.latent == reference_latent
        same_numbers = NUMBER.findall(sample.latent) == NUMBER.findall(reference_latent)
        if sample.source in OWN_PROPOSAL:
            counts["referenced"] += 1
            counts["match"] += is_match
            counts["numbers_match"] += same_numbers
        counts["selected_referenced"] += sample.selected
        counts["selected_match"] += sample.selected and is_match
        counts["selected_numbers_match"] += sample.selected and same_numbers

    def _add_weights(self, group: Sequence[Sample]) -> None:
        log_w_K = np.array([sample.log_weight for sample in group])
        drawn = [sample.log_weight for sample in group if sample.source not in EARLIER]
        self.sums["log_mean_weight"] += float(iwae_bound(np.array(drawn)))
        weights_K = normalized_weights(log_w_K)
        ess = effective_sample_size(weights_K)
        self.ess_counts[round(ess / ESS_RESOLUTION)] += 1
        self.bin_counts.update(np.floor(log_w_K / HISTOGRAM_BIN).astype(int).tolist())
        self.sums["ess"] += ess
        self.sums["max_weight"] += weights_K.max()
        self.sums["log_weight_std"] += log_w_K.std()

    def diagnostics(self) -> dict[str, float]:
        """The diagnostics of docs/method.md, section 4.3, over all chunks that were added.

        Means over chunks, of all candidates for the selection: effective sample size (eq. (5); also
        quantiles), largest normalized weight, standard deviation of log w (nats), number of
        distinct latents. Fractions of the draws from the model's own q′ (`samples`): those whose
        EoL was forced, and the probability of the draws that are ruled out (NaN where the sampler
        does not know it). Fraction of the chunks: those whose selected latent was reused. Lengths
        are in tokens.
        """
        counts, chunks, samples = self.counts, self.counts["chunks"], self.counts["samples"]
        return {
            "chunks": chunks,
            "samples": samples,
            "candidates": counts["candidates"],
            "ess_mean": _ratio(self.sums["ess"], chunks),
            "ess_p10": self._ess_quantile(0.1),
            "ess_p50": self._ess_quantile(0.5),
            "max_weight_mean": _ratio(self.sums["max_weight"], chunks),
            "log_weight_std_mean": _ratio(self.sums["log_weight_std"], chunks),
            "distinct_latents_mean": _ratio(counts["distinct"], chunks),
            "forced_fraction": _ratio(counts["length"], samples),
            "masked_mass": 1 - _ratio(self.sums["allowed"], samples),
            "latent_tokens_mean": _ratio(counts["tokens"], samples),
            "selected_earlier_fraction": _ratio(counts["selected_earlier"], chunks),
            "selected_latent_tokens": counts["selected_tokens"],
        }

    def _ess_quantile(self, fraction: float) -> float:
        """The smallest effective sample size that at least `fraction` of the chunks do not
        exceed; NaN without chunks."""
        cumulative = 0
        for index in sorted(self.ess_counts):
            cumulative += self.ess_counts[index]
            if cumulative >= fraction * self.counts["chunks"]:
                return round(index * ESS_RESOLUTION, 2)
        return math.nan

    def exact_match_metrics(self) -> dict[str, float]:
        """Fraction of samples, and of selected samples, whose text equals the reference latent, and
        of those that have its numbers in its order, over the chunks that have one that is not
        empty; no metrics if none has."""
        counts = self.counts
        if not counts["referenced"]:
            return {}
        metrics: dict[str, float] = {}
        for name, key in (("exact_match", "match"), ("numbers_match", "numbers_match")):
            metrics[name] = _ratio(counts[key], counts["referenced"])
            selected = counts[f"selected_{key}"], counts["selected_referenced"]
            metrics[f"{name}_selected"] = _ratio(*selected)
        return metrics

    def histogram(self) -> list[tuple[float, float, int]]:
        """(lower edge, upper edge, count) of log w, in at most MAX_HISTOGRAM_BINS adjacent bins
        whose edges are multiples of the bin width: HISTOGRAM_BIN nats times a power of 2."""
        if not self.bin_counts:
            return []
        counts, width = self.bin_counts, HISTOGRAM_BIN
        while max(counts) - min(counts) >= MAX_HISTOGRAM_BINS:
            wider: Counter[int] = Counter()
            for index, count in counts.items():
                wider[index // 2] += count
            counts, width = wider, 2 * width
        indices = range(min(counts), max(counts) + 1)
        return [(width * index, width * (index + 1), counts[index]) for index in indices]


def _ratio(total: float, count: int) -> float:
    return float(total / count) if count else math.nan
