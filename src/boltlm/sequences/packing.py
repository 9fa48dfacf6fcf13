"""Packing: documents become one stream of tokens, cut into training sequences of equal length.

A *segment* is what a format makes of one document, chunk or latent (docs/method.md, 3.2). Segments
are shuffled and concatenated into the stream (3.3). No token is dropped, and only the end of the
stream is padded. In segments and in the stream, a token without a loss is the complement ~id of its
id, which is negative. Orders and modes depend on (seed, epoch, document) alone. The stream and the
orders are memory-mapped files: memory does not grow with the corpus, and the batch of any step
is read directly.

Shape suffixes: B sequences of a batch, L sequence length, T = L + 1.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from boltlm.errors import UserError
from boltlm.seeds import generator, uniform
from boltlm.sequences import layouts
from boltlm.sequences.layouts import Layout, SequenceFormat, TokenIds
from boltlm.sequences.store import OFFSET_DTYPE, DocumentStore
from boltlm.shard_store import atomic_write
from boltlm.tokens import SpecialTokens

IGNORE_INDEX = -100  # the label of positions without a loss, as in torch's cross-entropy
WRITE_BLOCK = 1 << 20  # integers written to a file in one call
STREAM_FILE = "stream"
STATS_FILE = "stats.json"  # written last: without it, a folder is incomplete


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceFormatter:
    """Writes documents as segments of one format (docs/method.md, 3.2).

    `context_loss`: whether the context of a chunk row has a loss. `token_budget`: the maximum
    tokens of a chunk and its context together, as in the E-step.
    """

    special_tokens: SpecialTokens
    sequence_format: SequenceFormat
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

    def num_segments(self, store: DocumentStore) -> int:
        """How many segments an epoch has: one for each document, in the layout `chunk` one for
        each chunk, in the format `mixed` one for each chunk and then one for each latent."""
        if self.sequence_format == "mixed":
            return 2 * store.num_chunks
        by_chunk = self.sequence_format == "latent" and self.layout == "chunk"
        return store.num_chunks if by_chunk else len(store)

    def segment(self, store: DocumentStore, index: int, epoch: int) -> list[TokenIds]:
        """One segment of an epoch, in pieces to concatenate; none for a missing or empty latent."""
        special = self.special_tokens
        if self.sequence_format == "mixed":
            if index < store.num_chunks:
                return layouts.format_raw(special, store.text(index, index + 1))
            latent = store.latent(index - store.num_chunks)
            return layouts.format_raw(special, latent) if latent else []
        if self.sequence_format == "latent" and self.layout == "chunk":
            return [self._chunk_row(store, index, epoch)]
        start, end = store.chunk_range(index)
        if self.sequence_format in ("raw", "paraphrase"):
            return layouts.format_raw(special, store.text(start, end))
        modes = self.prior_modes(store.doc_id(index), end - start, epoch)
        pairs = [store.pair(chunk) for chunk in range(start, end)]
        return [layouts.format_document(special, pairs, modes)]

    def _chunk_row(self, store: DocumentStore, chunk: int, epoch: int) -> list[int]:
        document = store.document_of(chunk)
        start, end = store.chunk_range(document)
        pair = store.pair(chunk)
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


@dataclass(frozen=True, slots=True)
class SequenceSource:
    """Stored documents, their format, and their fraction `weight` of the stream's tokens.
    `shuffle_key` gives a further source of the same documents an order of its own."""

    store: DocumentStore
    formatter: SequenceFormatter
    weight: float = 1.0
    shuffle_key: tuple[str, ...] = ()

    def segments(self, epoch: int, scratch: Path) -> Iterator[np.ndarray]:
        """Every segment of one epoch once, shuffled, int32. `scratch`: for temporary files."""
        random = generator(self.formatter.seed, "epoch", epoch, *self.shuffle_key)
        for index in _permutation(self.formatter.num_segments(self.store), random, scratch):
            pieces = self.formatter.segment(self.store, int(index), epoch)
            if pieces:
                yield np.concatenate(pieces, dtype=np.int32, casting="same_kind")

    def endless_segments(self, scratch: Path) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, segment), epoch after epoch without end."""
        if not self.formatter.num_segments(self.store):
            raise UserError("the corpus has no documents; check `corpora` in params.yaml")
        epoch = 0
        while True:
            for segment in self.segments(epoch, scratch):
                yield epoch, segment
            epoch += 1

    def num_tokens(self, epochs: int, scratch: Path) -> int:
        """How many tokens the first `epochs` epochs have."""
        return sum(len(s) for epoch in range(epochs) for s in self.segments(epoch, scratch))


def _permutation(size: int, random: np.random.Generator, folder: Path) -> np.ndarray:
    """The same as `random.permutation(size)`, int64, but in an unnamed memory-mapped file, whose
    pages the operating system can evict from memory."""
    if not size:
        return np.zeros(0, OFFSET_DTYPE)
    with TemporaryFile(dir=folder) as file:
        # Written rather than mapped: a full disk is then an exception, not a bus error.
        for start in range(0, size, WRITE_BLOCK):
            block = np.arange(start, min(start + WRITE_BLOCK, size), dtype=OFFSET_DTYPE)
            file.write(block.tobytes())
        file.flush()
        order = np.asarray(np.memmap(file, OFFSET_DTYPE, mode="r+"))
    random.shuffle(order)
    return order


def interleave(
    sources: Sequence[SequenceSource], scratch: Path, epochs: int | None
) -> Iterator[np.ndarray]:
    """Segments of several sources, each from the source that lags furthest behind its weight.

    Ends after `epochs` epochs of the first source, or never where that is None.
    """
    streams = [source.endless_segments(scratch) for source in sources]
    num_written = [0.0] * len(sources)
    while True:
        chosen = min(range(len(sources)), key=lambda i: num_written[i] / sources[i].weight)
        epoch, segment = next(streams[chosen])
        if chosen == 0 and epoch == epochs:
            return
        num_written[chosen] += len(segment)
        yield segment


@dataclass(frozen=True, slots=True)
class PackedDataset:
    """The training sequences of a packed stream, in a shuffled order. `tokens`: the stream, with
    ~id for a token without a loss; `digest`: a hash of it."""

    tokens: np.ndarray
    sequence_length: int
    order: np.ndarray
    digest: str

    def __len__(self) -> int:
        """The number of training sequences."""
        return len(self.order)

    def batch(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs_BL, labels_BL) of a step, int64. The last batch may be smaller.

        Already shifted: labels_BL[b, i] is the token after inputs_BL[b, i], or IGNORE_INDEX where
        that token has no loss. Over all batches, every token with a loss but the stream's first is
        a label once. The end of the stream is padded with tokens 0 without a loss.
        """
        indices = self.order[step * batch_size : (step + 1) * batch_size]
        tokens_BT = np.full((len(indices), self.sequence_length + 1), ~0, dtype=np.int64)
        for row, index in enumerate(indices):
            tokens = self._sequence(index)
            tokens_BT[row, : len(tokens)] = tokens
        ids_BT = np.maximum(tokens_BT, ~tokens_BT)
        labels_BT = np.where(tokens_BT < 0, IGNORE_INDEX, tokens_BT)
        return ids_BT[:, :-1], labels_BT[:, 1:]

    def num_target_tokens(self, first_step: int, batch_size: int) -> int:
        """How many tokens the loss is taken on from a step to the end."""
        indices = self.order[first_step * batch_size :]
        return sum(int((self._sequence(index)[1:] >= 0).sum()) for index in indices)

    def _sequence(self, index: int) -> np.ndarray:
        """The tokens of a training sequence and the one after it; fewer at the stream's end."""
        start = index * self.sequence_length
        return self.tokens[start : start + self.sequence_length + 1]


def pack_sequences(
    sources: Callable[[Path], Sequence[SequenceSource]],
    folder: Path,
    *,
    sequence_length: int,
    seed: int,
    vocab_size: int,
    epochs: int | None,
    tokens: Callable[[Sequence[SequenceSource], Path], int] | int | None,
) -> PackedDataset:
    """The training sequences of `epochs` epochs of the first source, or of `tokens` tokens.

    The stream is written into `folder` unless it is complete there; only then are the sources
    made, `sources(folder)`, and a number of tokens computed from them, `tokens(sources, folder)`.
    Raises UserError unless exactly one of the two budgets is given, or where nothing is to predict.
    """
    if (epochs is None) == (tokens is None):
        raise UserError("a budget is either epochs or tokens, not both or neither")
    if not _is_packed(folder):
        folder.mkdir(parents=True, exist_ok=True)
        opened = sources(folder)
        max_tokens = tokens(opened, folder) if callable(tokens) else tokens
        has_complements = any(not source.formatter.context_loss for source in opened)
        small = np.dtype(np.int16 if has_complements else np.uint16)
        dtype = small if vocab_size <= np.iinfo(small).max + 1 else np.dtype(np.int32)
        _write_stream(opened, folder, epochs, max_tokens, dtype)
    return open_packed(folder, sequence_length, seed)


def _write_stream(
    sources: Sequence[SequenceSource],
    folder: Path,
    epochs: int | None,
    max_tokens: int | None,
    dtype: np.dtype,
) -> None:
    """Write the stream and then its statistics."""
    digest = hashlib.blake2b(digest_size=16)
    num_tokens = 0
    with (folder / STREAM_FILE).open("wb") as file:
        for segment in interleave(sources, folder, epochs):
            ids = segment if max_tokens is None else segment[: max_tokens - num_tokens]
            data = ids.astype(dtype).tobytes()
            file.write(data)
            digest.update(data)
            num_tokens += len(ids)
            if num_tokens == max_tokens:
                break
        file.flush()
        os.fsync(file.fileno())
    stats = {"tokens": num_tokens, "dtype": dtype.str, "digest": digest.hexdigest()}
    stats |= sources[0].store.counts()
    with atomic_write(folder / STATS_FILE) as temporary:
        temporary.write_text(json.dumps(stats), encoding="utf-8")


def _is_packed(folder: Path) -> bool:
    """Whether a folder has its statistics and a stream of the size that they state."""
    if not (folder / STATS_FILE).is_file():
        return False
    stats = packing_stats(folder)
    num_bytes = int(stats["tokens"]) * np.dtype(str(stats["dtype"])).itemsize
    return (folder / STREAM_FILE).stat().st_size == num_bytes


def packing_stats(folder: Path) -> dict[str, int | str]:
    """Tokens, dtype and digest of a packed stream, and the counts of its first source's store."""
    return json.loads((folder / STATS_FILE).read_text(encoding="utf-8"))


def open_packed(folder: Path, sequence_length: int, seed: int) -> PackedDataset:
    """The training sequences of a packed folder in the order of the seed.

    Raises UserError where the stream has no token to predict.
    """
    stats = packing_stats(folder)
    if int(stats["tokens"]) < 2:
        raise UserError(
            f"a budget of {stats['tokens']} tokens leaves no token to predict; increase"
            " models.<name>.budget in params.yaml"
        )
    stream = np.asarray(np.memmap(folder / STREAM_FILE, np.dtype(str(stats["dtype"])), mode="r"))
    num_sequences = -(-(len(stream) - 1) // sequence_length)
    order = _permutation(num_sequences, generator(seed, "rows"), folder)
    return PackedDataset(stream, sequence_length, order, str(stats["digest"]))
