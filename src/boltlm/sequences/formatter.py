"""Stored documents become segments of the training stream in one format (docs/method.md, 3.2).

A *segment* is what a format makes of one document, chunk or latent. Modes and draws depend on
(seed, epoch, document, chunk) alone.
"""

import math
from dataclasses import dataclass

import numpy as np

from boltlm.seeds import uniform
from boltlm.sequences import layouts
from boltlm.sequences.layouts import DrawChoice, Layout, SequenceFormat, TokenIds
from boltlm.sequences.store import DocumentStore
from boltlm.tokens import SpecialTokens

# The step between the points of successive epochs, modulo 1. Multiples of the golden ratio are the
# most evenly spread ones: over any number of epochs each interval has its share of the points.
EPOCH_STEP = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceFormatter:
    """Writes documents as segments of one format (docs/method.md, 3.2). In a segment, a token
    without a loss is the complement ~id of its id, which is negative.

    `draws`: which of the latents drawn for a chunk the format `latent` has (docs/method.md, 3.5);
    `context_loss`: whether the context of a chunk row has a loss; `token_budget`: the maximum
    tokens of a chunk and its context together, as in the E-step.
    """

    special_tokens: SpecialTokens
    sequence_format: SequenceFormat
    draws: DrawChoice
    layout: Layout
    context_loss: bool
    context_chunks: int
    token_budget: int
    seed: int

    def prior_modes(self, doc_id: str, num_chunks: int, epoch: int) -> list[bool]:
        """The modes of a document's chunks in an epoch; True is the prior mode."""
        return [self.prior_mode(doc_id, chunk, epoch) for chunk in range(num_chunks)]

    def prior_mode(self, doc_id: str, chunk: int, epoch: int) -> bool:
        """A fair coin that depends on (seed, epoch, document, chunk)."""
        return uniform(self.seed, "mode", epoch, doc_id, chunk) < 0.5

    def draw_of_epoch(self, store: DocumentStore, chunk: int, epoch: int) -> int | None:
        """The draw whose latent a chunk has in an epoch; None is the selected one.

        With `draws: resampled` its distribution is ŵ in every epoch: the cumulative distribution
        is inverted at a point that moves by EPOCH_STEP from epoch to epoch, modulo 1, from the
        uniform number of (seed, document, chunk).
        """
        if self.draws == "selected":
            return None
        document = store.document_of(chunk)
        chunk_in_document = chunk - store.chunk_range(document)[0]
        start = uniform(self.seed, "draws", store.doc_id(document), chunk_in_document)
        point = (start + epoch * EPOCH_STEP) % 1.0
        first, end = store.draw_range(chunk)
        cumulative = store.draw_weights[first:end].cumsum()
        return first + int(np.searchsorted(cumulative, point * cumulative[-1], side="right"))

    def num_segments(self, store: DocumentStore) -> int:
        """How many segments an epoch has: one for each document, in the layout `chunk` one for
        each chunk (with `draws: weighted` one for each of its draws), in the format `mixed` one for
        each chunk and then one for each latent."""
        if self.sequence_format == "mixed":
            return 2 * store.num_chunks
        if self.sequence_format == "latent" and self.layout == "chunk":
            return store.num_draws if self.draws == "weighted" else store.num_chunks
        return len(store)

    def segment(self, store: DocumentStore, index: int, epoch: int) -> list[TokenIds]:
        """One segment of an epoch, in pieces to concatenate; none for a missing or empty latent in
        the format `mixed`, or for a draw without weight."""
        special = self.special_tokens
        if self.sequence_format == "mixed":
            if index < store.num_chunks:
                return layouts.format_raw(special, store.text(index, index + 1))
            latent = store.latent(index - store.num_chunks)
            return layouts.format_raw(special, latent) if latent else []
        if self.sequence_format == "latent" and self.layout == "chunk":
            if self.draws != "weighted":
                draw = self.draw_of_epoch(store, index, epoch)
                return [self._chunk_row(store, index, draw, epoch)]
            chunk = store.chunk_of(index)
            has_weight = store.draw_weights[index] > 0
            return [self._chunk_row(store, chunk, index, epoch)] if has_weight else []
        start, end = store.chunk_range(index)
        if self.sequence_format in ("raw", "paraphrase"):
            return layouts.format_raw(special, store.text(start, end))
        modes = self.prior_modes(store.doc_id(index), end - start, epoch)
        chunks = range(start, end)
        pairs = [store.pair(chunk, self.draw_of_epoch(store, chunk, epoch)) for chunk in chunks]
        return [layouts.format_document(special, pairs, modes)]

    def loss_weight(self, store: DocumentStore, index: int) -> float:
        """The weight of every token of a segment in the loss: with `draws: weighted` the ŵ of its
        latent, else 1."""
        return float(store.draw_weights[index]) if self.draws == "weighted" else 1.0

    def has_raw_text(self, store: DocumentStore, index: int) -> bool:
        """Whether a segment has the text of chunks: not a paraphrase, nor a latent by itself."""
        is_latent = self.sequence_format == "mixed" and index >= store.num_chunks
        return not is_latent and self.sequence_format != "paraphrase"

    def _chunk_row(
        self, store: DocumentStore, chunk: int, draw: int | None, epoch: int
    ) -> list[int]:
        document = store.document_of(chunk)
        start, end = store.chunk_range(document)
        pair = store.pair(chunk, draw)
        earlier = range(max(start, chunk - self.context_chunks), chunk)
        context = layouts.select_context(
            [store.text(index, index + 1).tolist() for index in earlier],
            self.context_chunks,
            self.token_budget - len(pair.text),
        )
        if not self.context_loss:
            context = [~token for token in context]
        prior_mode = self.prior_mode(store.doc_id(document), chunk - start, epoch)
        return layouts.format_chunk_row(
            self.special_tokens, context, pair, prior_mode, is_last=chunk == end - 1
        )
