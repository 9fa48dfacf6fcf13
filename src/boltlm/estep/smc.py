"""Sequential Monte Carlo over the chunks of a document (docs/method.md, 4.6).

A particle is a document's latents so far. For chunk n, particle k draws Z_n from q′ in a context
that holds the latents of its earlier chunks, as the layout `document` has them in prior mode, and
is weighed by w_n,k = p(Z_n, X_n | C_k) / q′(Z_n | X_n, C_k). Before the next chunk the particles
are resampled in proportion to these weights, so Π_n (1/K) Σ_k w_n,k is an unbiased estimate of the
probability of the document's text. In the end one particle is selected by its last weight.

Shape suffixes: K particles.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from boltlm.estep.contexts import ChunkInContext, forward_tokens
from boltlm.estep.estep import EStep
from boltlm.estep.importance import normalized_weights, select_latent, systematic_resample
from boltlm.records import Chunk, Sample
from boltlm.seeds import uniform
from boltlm.sequences import layouts
from boltlm.tokens import SpecialTokens


class ParticleFilter:
    """The particles of one document. `groups`: the K samples of each chunk so far; `ancestors`: of
    each particle, the one of the chunk before that it continues."""

    def __init__(
        self, special: SpecialTokens, chunks: Sequence[Chunk], context_chunks: int, budget: int
    ) -> None:
        self.special, self.chunks = special, chunks
        self.context_chunks, self.token_budget = context_chunks, budget
        self.groups: list[list[Sample]] = []
        self.ancestors: list[int | None] = []
        self._pasts: list[list[list[int]]] = []  # of each particle: its chunks with their latents

    @property
    def is_done(self) -> bool:
        return len(self.groups) == len(self.chunks)

    def contexts(self, ancestors: Sequence[int | None]) -> list[ChunkInContext]:
        """The next chunk in the context of each of the particles that continue `ancestors`."""
        chunk = self.chunks[len(self.groups)]
        self.ancestors = list(ancestors)
        if self.groups:
            before, last = self.chunks[len(self.groups) - 1], self.groups[-1]
            pieces = [
                layouts.prior_chunk(self.special, layouts.LatentPair(before.tokens, sample.tokens))
                for sample in last
            ]
            self._pasts = [[*self._pasts[a], pieces[a]] for a in ancestors if a is not None]
        else:
            self._pasts = [[] for _ in ancestors]
        budget = self.token_budget - len(chunk.tokens)
        contexts = [layouts.select_context(p, self.context_chunks, budget) for p in self._pasts]
        return [
            ChunkInContext(chunk.doc_id, chunk.chunk, tuple(context), chunk.tokens)
            for context in contexts
        ]

    def resampled(self, num_particles: int, seed: int, purpose: str) -> list[int | None]:
        """Ancestors for the next chunk, by systematic resampling."""
        if not self.groups:
            return [None] * num_particles
        weights_K = normalized_weights(np.array([s.log_weight for s in self.groups[-1]]))
        chunk = self.chunks[len(self.groups)]
        point = uniform(seed, "resample", purpose, chunk.doc_id, chunk.chunk)
        return list(map(int, systematic_resample(weights_K, point)))

    def add(self, samples: Sequence[Sample]) -> None:
        """The samples of the chunk that `contexts` returned, one for each particle."""
        self.groups.append(
            [
                replace(sample, sample=k, ancestor=ancestor)
                for k, (sample, ancestor) in enumerate(zip(samples, self.ancestors, strict=True))
            ]
        )

    def selected(self, seed: int, purpose: str) -> list[list[Sample]]:
        """The samples of all chunks, with those of one particle and its ancestors marked."""
        log_w_K = np.array([sample.log_weight for sample in self.groups[-1]])
        j: int | None = select_latent(log_w_K, seed, "select", purpose, self.chunks[0].doc_id)
        marked: list[list[Sample]] = []
        for group in reversed(self.groups):
            assert j is not None
            marked.append([replace(s, selected=k == j) for k, s in enumerate(group)])
            j = group[j].ancestor
        return marked[::-1]


def run_smc(
    estep: EStep,
    chunks: Sequence[Chunk],
    num_particles: int,
    *,
    context_chunks: int,
    token_budget: int,
) -> list[list[Sample]]:
    """`num_particles` samples of each chunk, in the order of `chunks`. The chunks of a document
    must be consecutive; `context_chunks` and `token_budget` as for `chunks_in_context`."""
    seed, purpose = estep.seed, estep.purpose
    filters = [
        ParticleFilter(estep.special_tokens, list(group), context_chunks, token_budget)
        for _, group in groupby(chunks, lambda chunk: chunk.doc_id)
    ]
    while active := [f for f in filters if not f.is_done]:
        contexts = [f.contexts(f.resampled(num_particles, seed, purpose)) for f in active]
        flat = [chunk for group in contexts for chunk in group]
        keys = [
            ("particle", purpose, chunk.doc_id, chunk.chunk, k)
            for group in contexts
            for k, chunk in enumerate(group)
        ]
        drawn = [group[0] for group in estep.draw(flat, 1, source="particle", keys=keys)]
        for index, particle_filter in enumerate(active):
            particle_filter.add(drawn[index * num_particles : (index + 1) * num_particles])
    return [group for f in filters for group in f.selected(seed, purpose)]


def smc_forward_tokens(
    special: SpecialTokens,
    chunks: Sequence[Chunk],
    groups: Sequence[Sequence[Sample]],
    *,
    context_chunks: int,
    token_budget: int,
) -> int:
    """As `forward_tokens`, for `groups` that `run_smc` returned for `chunks`: every particle has a
    context of its own."""
    total, rows = 0, iter(groups)
    for _, document in groupby(chunks, lambda chunk: chunk.doc_id):
        particles = ParticleFilter(special, list(document), context_chunks, token_budget)
        while not particles.is_done:
            group = next(rows)
            contexts = particles.contexts([sample.ancestor for sample in group])
            for context, sample in zip(contexts, group, strict=True):
                total += forward_tokens(special, context, [sample])
            particles.add(group)
    return total
