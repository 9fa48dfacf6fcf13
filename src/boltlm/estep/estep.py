"""The E-step (docs/method.md, section 4): sample K latents per chunk from q′, weight each by p/q′,
select one.

Letters as in docs/method.md: X chunk, C its context, Z latent, q′ proposal, p model, w weight.

    eq. (1)   log q′ = log q′(Z, EoL | BOS C SoL EoL X SoL Post)                   the sampler
    eq. (2)   log p  = log p(Z, EoL | BOS C SoL Prior)
                     + log p(X | BOS C SoL Prior Z EoL)                            joint_scores
    eq. (3)   log w  = log p − log q′                                              EStep
    eq. (4)   j ~ Categorical(softmax(log w_1, …, log w_K))                        importance
    eq. (16)  log w  = log p − log Σ_s (n_s/n) q_s, draws from several laws        mixture

p and q are the same model with different prompts; q′ is q without the tokens that a latent cannot
contain, and with EoL forced at the maximum length. Log-probabilities are computed from the sampled
token ids; nothing is decoded and encoded again in between.

Shapes: K samples of a chunk.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedModel

from boltlm.estep.config import PAPER_OPTIONS, EStepOptions, SamplingConfig
from boltlm.estep.contexts import ChunkInContext, JointScores, Throughput, joint_scores
from boltlm.estep.importance import select_latent
from boltlm.estep.mixture import Candidate, Pool, PreviousDraws
from boltlm.estep.samplers import Draw, SampleKey, Sampler, TransformersSampler
from boltlm.estep.scoring import proposal_log_probs, token_log_probs
from boltlm.records import Sample, SampleSource
from boltlm.sequences import layouts
from boltlm.sequences.layouts import TokenIds
from boltlm.tokens import TextCoder


class EStep:
    """Samples, scores and selects latents with one model, which is both q and p.

    `purpose` is part of the keys of all random numbers. Without a `sampler` the model itself draws
    (TransformersSampler). `options` is the estimator. `throughput` accumulates over calls of `run`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        coder: TextCoder,
        config: SamplingConfig,
        *,
        max_latent_tokens: int,
        seed: int,
        purpose: str,
        sampler: Sampler | None = None,
        options: EStepOptions = PAPER_OPTIONS,
    ) -> None:
        self.model, self.coder, self.config = model, coder, config
        self.special_tokens, self.seed, self.purpose = coder.special_tokens, seed, purpose
        self.max_latent_tokens, self.options = max_latent_tokens, options
        self.sampler: Sampler = sampler or TransformersSampler(
            model,
            coder.special_tokens,
            max_latent_tokens,
            config.batch_tokens,
            seed,
            options.temperature,
        )
        self.throughput = Throughput()

    def run(
        self,
        chunks: Sequence[ChunkInContext],
        num_samples: int,
        reusable: Sequence[Sequence[Sample]] | None = None,
        previous: PreviousDraws | None = None,
    ) -> list[list[Sample]]:
        """`num_samples` new samples of each chunk, and those that the options add; one of them is
        selected.

        The random numbers of a sample depend on (seed, purpose, doc_id, chunk, source, k) only, so
        a larger K extends a smaller one. `reusable`: draws from the proposal that this E-step made
        for another K or with other options; only the missing ones are drawn. `previous`: those of
        the iteration before, for `options.reuse`. Raises UserError where it lacks a chunk.
        """
        options = self.options
        num_proposal = num_samples - options.prior_draws
        pools = [Pool() for _ in chunks]
        _add(pools, self._proposal_draws(chunks, num_proposal, reusable))
        if options.prior_draws:
            _add(pools, self.draw(chunks, options.prior_draws, source="prior"))
        if previous is not None:
            for pool, earlier in zip(pools, self._earlier_draws(chunks, previous), strict=True):
                pool.candidates += earlier
        self._add_densities(chunks, pools, previous)
        if options.extra_draws:
            self._draw_more(chunks, pools, num_proposal, previous)
        return [self._select(pool.weighted()) for pool in pools]

    def _proposal_draws(
        self,
        chunks: Sequence[ChunkInContext],
        num_samples: int,
        reusable: Sequence[Sequence[Sample]] | None,
    ) -> list[list[Sample]]:
        num_reusable = min((len(group) for group in reusable or ()), default=0)
        if num_reusable >= num_samples:
            return [list(group[:num_samples]) for group in reusable or ()]
        first = [group[:num_reusable] for group in reusable or [()] * len(chunks)]
        drawn = self.draw(chunks, num_samples - num_reusable, num_reusable)
        return [[*old, *new] for old, new in zip(first, drawn, strict=True)]

    def draw(
        self,
        chunks: Sequence[ChunkInContext],
        num_samples: int,
        first_index: int = 0,
        *,
        source: SampleSource = "proposal",
        keys: Sequence[SampleKey] | None = None,
    ) -> list[list[Sample]]:
        """Draws `first_index`, `first_index` + 1, … from the proposal or the prior, scored; none is
        selected yet. `log_q` is that of the law that was drawn from. `keys`: of the random numbers
        of each chunk, by default the chunk's own."""
        prompts = self._prompts(chunks, source)
        kind = "sample" if source == "proposal" else source
        keys = keys or [(kind, self.purpose, c.doc_id, c.chunk) for c in chunks]
        start = time.monotonic()
        draws = self.sampler.sample(prompts, keys, num_samples, first_index)
        sampled = time.monotonic()
        if self.config.rescore_q:
            draws = self._rescored(prompts, draws)
        latents = [[draw.tokens for draw in draws_K] for draws_K in draws]
        scores = self._joint_scores(chunks, latents)
        self._record_throughput(chunks, draws, sampled - start, time.monotonic() - sampled)
        return [
            [
                self._sample(chunk, source, first_index + k, draw, score)
                for k, (draw, score) in enumerate(zip(draws_K, scores_K, strict=True))
            ]
            for chunk, draws_K, scores_K in zip(chunks, draws, scores, strict=True)
        ]

    def _prompts(self, chunks: Sequence[ChunkInContext], law: SampleSource) -> list[list[int]]:
        special = self.special_tokens
        if law == "prior":
            return [layouts.prior_prompt(special, c.context) for c in chunks]
        return [layouts.posterior_prompt(special, c.context, c.text) for c in chunks]

    def _joint_scores(
        self, chunks: Sequence[ChunkInContext], latents: Sequence[Sequence[TokenIds]]
    ) -> list[list[JointScores]]:
        return joint_scores(
            self.model, self.special_tokens, chunks, latents, self.config.batch_tokens
        )

    def _rescored(
        self, prompts: Sequence[TokenIds], draws: Sequence[Sequence[Draw]]
    ) -> list[list[Draw]]:
        """The same draws with log q′, eq. (1), and `log_allowed`, eq. (1a), by the scorer."""
        eol, temperature = self.special_tokens.eol, self.options.temperature
        latents = [[draw.tokens for draw in draws_K] for draws_K in draws]
        ended = [[(*z, eol) for z in group] for group in latents]
        log_q = self.log_densities(self.model, prompts, latents)
        plain = token_log_probs(
            self.model, prompts, ended, self.config.batch_tokens, temperature=temperature
        )
        return [
            [
                replace(draw, log_q=q, log_allowed=float(plain_L.sum()) - q)
                for draw, q, plain_L in zip(*scored, strict=True)
            ]
            for scored in zip(draws, log_q, plain, strict=True)
        ]

    def log_densities(
        self,
        model: PreTrainedModel,
        prompts: Sequence[TokenIds],
        latents: Sequence[Sequence[TokenIds]],
    ) -> list[list[float]]:
        """log q′ of latents behind each prompt, by a model, at this estimator's temperature."""
        return proposal_log_probs(
            model,
            self.special_tokens,
            prompts,
            latents,
            max_latent_tokens=self.max_latent_tokens,
            batch_tokens=self.config.batch_tokens,
            temperature=self.options.temperature,
        )

    def _record_throughput(
        self,
        chunks: Sequence[ChunkInContext],
        draws: Sequence[Sequence[Draw]],
        sample_seconds: float,
        score_seconds: float,
    ) -> None:
        throughput = self.throughput
        throughput.sample_seconds += sample_seconds
        throughput.score_seconds += score_seconds
        for chunk, draws_K in zip(chunks, draws, strict=True):
            ended = sum(len(draw.tokens) + 1 for draw in draws_K)
            throughput.sampled_tokens += ended
            throughput.scored_tokens += ended + len(draws_K) * len(chunk.text)

    def _sample(
        self, chunk: ChunkInContext, source: SampleSource, k: int, draw: Draw, score: JointScores
    ) -> Sample:
        return Sample(
            doc_id=chunk.doc_id,
            chunk=chunk.chunk,
            source=source,
            sample=k,
            latent=self.coder.decode(list(draw.tokens)),
            tokens=draw.tokens,
            finish=draw.finish,
            log_q=draw.log_q,
            log_allowed=draw.log_allowed,
            log_p_latent=score.latent,
            log_p_text=score.text,
            log_weight=score.latent + score.text - draw.log_q,  # eq. (3)
            selected=False,
        )

    def _earlier_draws(
        self, chunks: Sequence[ChunkInContext], previous: PreviousDraws
    ) -> list[list[Candidate]]:
        """Draws of the iteration before, scored by the present model."""
        groups = [previous.of(chunk.doc_id, chunk.chunk) for chunk in chunks]
        latents = [[sample.tokens for sample in group] for group in groups]
        scores = self._joint_scores(chunks, latents)
        return [
            [
                previous.candidate(sample, score.latent, score.text)
                for sample, score in zip(*pair, strict=True)
            ]
            for pair in zip(groups, scores, strict=True)
        ]

    def _add_densities(
        self,
        chunks: Sequence[ChunkInContext],
        pools: Sequence[Pool],
        previous: PreviousDraws | None,
    ) -> None:
        """Complete the densities of all candidates under all laws of their pool."""
        laws: list[SampleSource] = sorted({law for pool in pools for law in pool.laws})
        for law in laws:
            missing = [pool.without(law) for pool in pools]
            rows = [row for row, candidates in enumerate(missing) if candidates]
            model = previous.model if law == "previous" and previous else self.model
            assert model is not None, "the model of the previous draws"
            log_densities = self.log_densities(
                model,
                self._prompts([chunks[row] for row in rows], law),
                [[c.sample.tokens for c in missing[row]] for row in rows],
            )
            for row, values in zip(rows, log_densities, strict=True):
                for candidate, value in zip(missing[row], values, strict=True):
                    candidate.log_densities[law] = value

    def _draw_more(
        self,
        chunks: Sequence[ChunkInContext],
        pools: Sequence[Pool],
        first_index: int,
        previous: PreviousDraws | None,
    ) -> None:
        """Add `extra_draws` to the pools whose effective sample size is too small."""
        is_low = [pool.ess_fraction() < self.options.min_ess_fraction for pool in pools]
        rows = [row for row, low in enumerate(is_low) if low]
        some, low = [chunks[row] for row in rows], [pools[row] for row in rows]
        if rows:
            _add(low, self.draw(some, self.options.extra_draws, first_index))
            self._add_densities(some, low, previous)

    def _select(self, samples: list[Sample]) -> list[Sample]:
        """Mark the sample j of eq. (4), or of the control that replaces it."""
        log_w_K = np.array([sample.log_weight for sample in samples])
        if self.options.selection == "best":
            j = int(log_w_K.argmax())
        else:
            log_w_K = log_w_K if self.options.selection == "weighted" else np.zeros_like(log_w_K)
            doc_id, chunk = samples[0].doc_id, samples[0].chunk
            j = select_latent(log_w_K, self.seed, "select", self.purpose, doc_id, chunk)
        return [replace(sample, selected=k == j) for k, sample in enumerate(samples)]


def _add(pools: Sequence[Pool], groups: Sequence[Sequence[Sample]]) -> None:
    for pool, group in zip(pools, groups, strict=True):
        pool.add(group)
