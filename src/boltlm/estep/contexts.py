"""Chunks in their contexts: what is scored under the joint distribution, and how many tokens that
takes (docs/method.md, sections 4.1 and 7.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from boltlm.estep.scoring import token_log_probs
from boltlm.records import Chunk, Sample
from boltlm.sequences import layouts
from boltlm.sequences.layouts import TokenIds
from boltlm.tokens import SpecialTokens


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


def forward_tokens(special: SpecialTokens, chunk: ChunkInContext, samples: Sequence[Sample]) -> int:
    """The tokens that the E-step has to run through a model for a chunk, eq. (15): every prompt
    once for each law, with Z EoL of each draw whose density under it is needed, and the joint
    prompt with every Z EoL X."""
    sources = {sample.source for sample in samples}
    posterior = len(layouts.posterior_prompt(special, chunk.context, chunk.text))
    prior = len(layouts.prior_prompt(special, chunk.context))
    ended = sum(len(sample.tokens) + 1 for sample in samples)
    total = posterior + ended + prior + ended + len(samples) * len(chunk.text)
    if "prior" in sources:
        total += prior + ended
    if "previous" in sources:  # the densities of its own draws are stored
        total += posterior + sum(len(s.tokens) + 1 for s in samples if s.source != "previous")
    return total


@dataclass(slots=True)
class Throughput:
    """Time spent on drawing latents and on scoring them under p (seconds), and the number of tokens
    processed; what further laws of an estimator take is not included. Tokens
    are counted once per sample, including EoL and the chunk's text, even where samples shared
    computation."""

    sampled_tokens: int = 0
    scored_tokens: int = 0
    sample_seconds: float = 0.0
    score_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class JointScores:
    """The two terms of eq. (2), in nats: `latent` is log p(Z, EoL | BOS C SoL Prior), `text` is
    log p(X | BOS C SoL Prior Z EoL)."""

    latent: float
    text: float


def joint_scores(
    model: PreTrainedModel,
    special: SpecialTokens,
    chunks: Sequence[ChunkInContext],
    latents: Sequence[Sequence[TokenIds]],
    batch_tokens: int,
) -> list[list[JointScores]]:
    """Both terms of log p, eq. (2), for each latent of each chunk."""
    prefixes = [layouts.prior_prompt(special, chunk.context) for chunk in chunks]
    branches = [
        [(*latent, special.eol, *chunk.text) for latent in latents_K]
        for chunk, latents_K in zip(chunks, latents, strict=True)
    ]
    log_probs = token_log_probs(model, prefixes, branches, batch_tokens)
    return [
        [
            _split_joint(len(latent) + 1, log_probs_L)
            for latent, log_probs_L in zip(latents_K, log_probs_KL, strict=True)
        ]
        for latents_K, log_probs_KL in zip(latents, log_probs, strict=True)
    ]


def _split_joint(latent_length: int, log_probs_L: np.ndarray) -> JointScores:
    """Sums over the tokens of (Z, EoL) and over those of X."""
    return JointScores(
        float(log_probs_L[:latent_length].sum()), float(log_probs_L[latent_length:].sum())
    )
