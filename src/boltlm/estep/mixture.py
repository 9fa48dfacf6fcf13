"""Importance weights of a pool of latents that were drawn from several laws (docs/method.md, 4.5).

Letters as in docs/method.md: Z latent, p model, q_s the law of source s, n_s the number of its
draws, n = Σ n_s.

    eq. (16)   log w = log p(Z, X | C) − log Σ_s (n_s / n) q_s(Z | X, C)

With a single source this is eq. (3). Retained latents are weighed as draws and do not count in n_s.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from transformers import PreTrainedModel

from boltlm.errors import UserError
from boltlm.estep.importance import effective_sample_size, normalized_weights
from boltlm.records import Sample, SampleSource


@dataclass(slots=True)
class Candidate:
    """A latent in the pool of a chunk, and its log-densities under the laws that the pool was drawn
    from, in nats."""

    sample: Sample
    log_densities: dict[str, float]


@dataclass(slots=True)
class Pool:
    """The candidates of a chunk."""

    candidates: list[Candidate] = field(default_factory=list)

    def add(self, samples: Sequence[Sample]) -> None:
        """Add draws whose `log_q` is that of the law that they were drawn from."""
        self.candidates += [Candidate(sample, {sample.source: sample.log_q}) for sample in samples]

    @property
    def num_draws(self) -> Mapping[SampleSource, int]:
        """n_s for each source s."""
        counts: Counter[SampleSource] = Counter(c.sample.source for c in self.candidates)
        del counts["retained"]
        return counts

    @property
    def laws(self) -> list[SampleSource]:
        """The laws under which every candidate needs a density: that of each source, and that of
        the proposal, which is stored as `log_q`."""
        return list({*self.num_draws, "proposal"})

    def without(self, law: SampleSource) -> list[Candidate]:
        """The candidates whose density under a law is not known yet."""
        return [c for c in self.candidates if law not in c.log_densities]

    def log_weights(self) -> np.ndarray:
        """Eq. (16) of each candidate."""
        num_draws = self.num_draws
        total = sum(num_draws.values())
        log_shares = {law: math.log(count / total) for law, count in num_draws.items()}
        return np.array(
            [
                candidate.sample.log_p_latent
                + candidate.sample.log_p_text
                - np.logaddexp.reduce(
                    [share + candidate.log_densities[law] for law, share in log_shares.items()]
                )
                for candidate in self.candidates
            ]
        )

    def ess_fraction(self) -> float:
        """The effective sample size, eq. (5), over the number of candidates."""
        ess = effective_sample_size(normalized_weights(self.log_weights()))
        return ess / len(self.candidates)

    def weighted(self) -> list[Sample]:
        """The candidates as samples with their weights; none is selected yet."""
        pairs = zip(self.candidates, self.log_weights().tolist(), strict=True)
        return [
            replace(
                candidate.sample,
                log_q=candidate.log_densities["proposal"],
                log_weight=log_weight,
                selected=False,
            )
            for candidate, log_weight in pairs
        ]


@dataclass(frozen=True, slots=True)
class PreviousDraws:
    """What an E-step reuses of the one before: with `model`, which made them, its own draws from
    the proposal, else the latent that it selected. `groups`: its samples by (doc_id, chunk)."""

    groups: Mapping[tuple[str, int], Sequence[Sample]]
    model: PreTrainedModel | None

    def of(self, doc_id: str, chunk: int) -> list[Sample]:
        """The samples of a chunk that are reused. Raises UserError where there are none."""
        group = self.groups.get((doc_id, chunk), ())
        reused = [s for s in group if (s.source == "proposal" if self.model else s.selected)]
        if not reused:
            raise UserError(
                f"the previous latents have no draws to reuse for chunk {chunk} of document"
                f" {doc_id}; `previous` must name latents of the same corpus, not of method smc"
            )
        return reused

    def candidate(self, sample: Sample, log_p_latent: float, log_p_text: float) -> Candidate:
        """An earlier sample with the scores of the present model. The density under the law that it
        was drawn from is known already."""
        source: SampleSource = "previous" if self.model else "retained"
        scored = replace(
            sample,
            source=source,
            log_allowed=math.nan,
            log_p_latent=log_p_latent,
            log_p_text=log_p_text,
        )
        return Candidate(scored, {"previous": sample.log_q} if self.model else {})
