"""The E-step (docs/method.md, section 4): sample K latents per chunk from q′, weight each by p/q′,
select one.

Letters as in docs/method.md: X chunk, C its context, Z latent, q′ proposal, p model, w weight.

    eq. (1)   log q′ = log q′(Z, EoL | BOS C SoL EoL X SoL Post)                   the sampler
    eq. (2)   log p  = log p(Z, EoL | BOS C SoL Prior)
                     + log p(X | BOS C SoL Prior Z EoL)                            joint_scores
    eq. (3)   log w  = log p − log q′                                              EStep
    eq. (4)   j ~ Categorical(softmax(log w_1, …, log w_K))                        importance

p and q are the same model with different prompts; q′ is q without the tokens that a latent cannot
contain, and with EoL forced at the maximum length. Log-probabilities are computed from the sampled
token ids; nothing is decoded and encoded again in between.

Shapes: K samples of a chunk.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel

from boltlm.estep.config import SamplingConfig, Selection
from boltlm.estep.importance import select_latent
from boltlm.estep.samplers import Draw, Sampler, TransformersSampler
from boltlm.estep.scoring import token_log_probs
from boltlm.records import Chunk, Sample
from boltlm.sequences import layouts
from boltlm.sequences.layouts import TokenIds
from boltlm.tokens import SpecialTokens, TextCoder


@dataclass(frozen=True, slots=True)
class ChunkInContext:
    """A chunk X (`text`) and its context C (`context`) as token ids."""

    doc_id: str
    chunk: int
    context: tuple[int, ...]
    text: tuple[int, ...]


def chunks_in_context(
    chunks: Sequence[Chunk], context_chunks: int, token_budget: int
) -> list[ChunkInContext]:
    """Chunks with their raw context: up to `context_chunks` preceding chunks of the same document.

    `token_budget`: maximum length of C and X together, in tokens. The chunks of a document must be
    consecutive and in reading order.
    """
    with_context: list[ChunkInContext] = []
    preceding: list[TokenIds] = []
    doc_id = None
    for chunk in chunks:
        if chunk.doc_id != doc_id:
            doc_id, preceding = chunk.doc_id, []
        context = layouts.select_context(
            preceding, context_chunks, token_budget - len(chunk.tokens)
        )
        with_context.append(ChunkInContext(chunk.doc_id, chunk.chunk, tuple(context), chunk.tokens))
        preceding.append(chunk.tokens)
    return with_context


def forward_tokens(chunk: ChunkInContext, samples: Sequence[Sample]) -> int:
    """The tokens that the E-step has to run through the model for a chunk: the proposal prompt with
    every Z EoL after it, and the joint prompt with every Z EoL X after it."""
    proposal_prompt, joint_prompt = len(chunk.context) + len(chunk.text) + 5, len(chunk.context) + 3
    ended = sum(len(sample.tokens) + 1 for sample in samples)
    return proposal_prompt + ended + joint_prompt + ended + len(samples) * len(chunk.text)


@dataclass(frozen=True, slots=True)
class JointScores:
    """The two terms of eq. (2), in nats: `latent` is log p(Z, EoL | BOS C SoL Prior), `text` is
    log p(X | BOS C SoL Prior Z EoL)."""

    latent: float
    text: float


@dataclass(slots=True)
class Throughput:
    """Time spent on sampling and on scoring (seconds), and the number of tokens processed. Tokens
    are counted once per sample, including EoL and the chunk's text, even where samples shared
    computation."""

    sampled_tokens: int = 0
    scored_tokens: int = 0
    sample_seconds: float = 0.0
    score_seconds: float = 0.0


class EStep:
    """Samples, scores and selects latents with one model, which is both q and p.

    `purpose` is part of the keys of all random numbers. Without a `sampler` the model itself draws
    (TransformersSampler). `selection` "uniform" replaces the weights of eq. (4) by equal ones.
    `throughput` accumulates over calls of `run`.
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
        selection: Selection = "weighted",
    ) -> None:
        self.model, self.coder, self.config = model, coder, config
        self.special_tokens, self.seed, self.purpose = coder.special_tokens, seed, purpose
        self.max_latent_tokens, self.selection = max_latent_tokens, selection
        self.sampler: Sampler = sampler or TransformersSampler(
            model, coder.special_tokens, max_latent_tokens, config.batch_tokens, seed
        )
        self.throughput = Throughput()

    def run(
        self,
        chunks: Sequence[ChunkInContext],
        num_samples: int,
        previous: Sequence[Sequence[Sample]] | None = None,
    ) -> list[list[Sample]]:
        """`num_samples` samples of each chunk, one of them selected.

        The random numbers of a sample depend on (seed, purpose, doc_id, chunk, k) only, so a larger
        K extends a smaller one. `previous`: samples of the same chunks that were drawn for another
        K or another selection; they are reused, and only the missing ones are drawn.
        """
        num_previous = min((len(group) for group in previous or ()), default=0)
        num_reused = min(num_previous, num_samples)
        reused = [list(group[:num_reused]) for group in previous or ()] if num_reused else None
        drawn = None
        if num_samples > num_previous:
            drawn = self._draw(chunks, num_samples - num_previous, num_previous)
        empty: list[list[Sample]] = [[] for _ in chunks]
        return [
            self._select([*first, *second])
            for first, second in zip(reused or empty, drawn or empty, strict=True)
        ]

    def _draw(
        self, chunks: Sequence[ChunkInContext], num_samples: int, first_index: int
    ) -> list[list[Sample]]:
        """Sample and score; no sample is selected yet."""
        special, batch_tokens = self.special_tokens, self.config.batch_tokens
        prompts = [layouts.posterior_prompt(special, c.context, c.text) for c in chunks]
        keys = [("sample", self.purpose, c.doc_id, c.chunk) for c in chunks]
        start = time.monotonic()
        draws = self.sampler.sample(prompts, keys, num_samples, first_index)
        sampled = time.monotonic()
        if self.config.rescore_q:
            draws = rescore_proposal(self.model, special, prompts, draws, batch_tokens)
        scores = joint_scores(self.model, special, chunks, draws, batch_tokens)
        self._record_throughput(chunks, draws, sampled - start, time.monotonic() - sampled)
        return [
            [
                self._sample(chunk, first_index + k, draw, score)
                for k, (draw, score) in enumerate(zip(draws_K, scores_K, strict=True))
            ]
            for chunk, draws_K, scores_K in zip(chunks, draws, scores, strict=True)
        ]

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

    def _sample(self, chunk: ChunkInContext, index: int, draw: Draw, score: JointScores) -> Sample:
        return Sample(
            doc_id=chunk.doc_id,
            chunk=chunk.chunk,
            sample=index,
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

    def _select(self, samples: list[Sample]) -> list[Sample]:
        """Mark the sample j of eq. (4)."""
        is_weighted = self.selection == "weighted"
        log_w_K = np.array([sample.log_weight if is_weighted else 0.0 for sample in samples])
        doc_id, chunk = samples[0].doc_id, samples[0].chunk
        j = select_latent(log_w_K, self.seed, "select", self.purpose, doc_id, chunk)
        return [replace(sample, selected=k == j) for k, sample in enumerate(samples)]


def rescore_proposal(
    model: PreTrainedModel,
    special: SpecialTokens,
    prompts: Sequence[TokenIds],
    draws: Sequence[Sequence[Draw]],
    batch_tokens: int,
) -> list[list[Draw]]:
    """The same draws with log q′, eq. (1), and `log_allowed`, eq. (1a), by the scorer."""
    branches = [[(*draw.tokens, special.eol) for draw in draws_K] for draws_K in draws]
    masked = token_log_probs(model, prompts, branches, batch_tokens, special.barred)
    plain = token_log_probs(model, prompts, branches, batch_tokens)
    return [
        [_rescored(*scored) for scored in zip(draws_K, masked_KL, plain_KL, strict=True)]
        for draws_K, masked_KL, plain_KL in zip(draws, masked, plain, strict=True)
    ]


def _rescored(draw: Draw, masked_L: np.ndarray, plain_L: np.ndarray) -> Draw:
    """`masked_L`, `plain_L`: log-probabilities of Z EoL without and with the barred tokens. An EoL
    that was forced has probability 1 in q′."""
    log_q = float(masked_L.sum() if draw.finish == "stop" else masked_L[:-1].sum())
    return replace(draw, log_q=log_q, log_allowed=float(plain_L.sum()) - log_q)


def joint_scores(
    model: PreTrainedModel,
    special: SpecialTokens,
    chunks: Sequence[ChunkInContext],
    draws: Sequence[Sequence[Draw]],
    batch_tokens: int,
) -> list[list[JointScores]]:
    """Both terms of log p, eq. (2), for each draw of each chunk."""
    prefixes = [layouts.prior_prompt(special, chunk.context) for chunk in chunks]
    branches = [
        [(*draw.tokens, special.eol, *chunk.text) for draw in draws_K]
        for chunk, draws_K in zip(chunks, draws, strict=True)
    ]
    log_probs = token_log_probs(model, prefixes, branches, batch_tokens)
    return [
        [
            _split_joint(len(draw.tokens) + 1, log_probs_L)
            for draw, log_probs_L in zip(draws_K, log_probs_KL, strict=True)
        ]
        for draws_K, log_probs_KL in zip(draws, log_probs, strict=True)
    ]


def _split_joint(latent_length: int, log_probs_L: np.ndarray) -> JointScores:
    """Sums over the tokens of (Z, EoL) and over those of X."""
    return JointScores(
        float(log_probs_L[:latent_length].sum()), float(log_probs_L[latent_length:].sum())
    )
