"""Segments of documents in a shuffled order, and mixtures of sources (docs/method.md, 3.3)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import numpy as np

from boltlm.errors import UserError
from boltlm.seeds import generator
from boltlm.sequences.formatter import SequenceFormatter
from boltlm.sequences.layouts import MixUnit
from boltlm.sequences.store import OFFSET_DTYPE, DocumentStore

WRITE_BLOCK = 1 << 20  # integers written to a file in one call


class Segment(NamedTuple):
    """A segment's tokens, int32, their weight in the loss, and whether some are raw text."""

    tokens: np.ndarray
    loss_weight: float
    has_text: bool


@dataclass(frozen=True, slots=True)
class SequenceSource:
    """Stored documents, their format, and their fraction `weight` of the stream. `shuffle_key`
    gives a further source of the same documents an order of its own."""

    store: DocumentStore
    formatter: SequenceFormatter
    weight: float = 1.0
    shuffle_key: tuple[str, ...] = ()

    def segments(self, epoch: int, scratch: Path) -> Iterator[Segment]:
        """Every segment of one epoch once, shuffled. `scratch`: for temporary files."""
        random = generator(self.formatter.seed, "epoch", epoch, *self.shuffle_key)
        for index in permutation(self.formatter.num_segments(self.store), random, scratch):
            pieces = self.formatter.segment(self.store, int(index), epoch)
            if pieces:
                tokens = np.concatenate(pieces, dtype=np.int32, casting="same_kind")
                loss_weight = self.formatter.loss_weight(self.store, int(index))
                has_text = self.formatter.has_raw_text(self.store, int(index))
                yield Segment(tokens, loss_weight, has_text)

    def endless_segments(self, scratch: Path) -> Iterator[tuple[int, Segment]]:
        """Each segment with its epoch, epoch after epoch without end."""
        if not self.formatter.num_segments(self.store):
            raise UserError("the corpus has no documents; check `corpora` in params.yaml")
        epoch = 0
        while True:
            yield from ((epoch, segment) for segment in self.segments(epoch, scratch))
            epoch += 1

    def num_tokens(self, epochs: int, scratch: Path) -> int:
        """How many tokens the first `epochs` epochs have."""
        lengths = (len(s.tokens) for e in range(epochs) for s in self.segments(e, scratch))
        return sum(lengths)


def permutation(size: int, random: np.random.Generator, folder: Path) -> np.ndarray:
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
    sources: Sequence[SequenceSource],
    scratch: Path,
    epochs: int | None,
    mix_unit: MixUnit = "tokens",
) -> Iterator[Segment]:
    """Segments of several sources, each from the source that lags furthest behind its weight.
    `mix_unit`: what the weights are fractions of; a segment counts as one document.

    Ends after `epochs` epochs of the first source, or never where that is None.
    """
    streams = [source.endless_segments(scratch) for source in sources]
    num_written = [0.0] * len(sources)
    while True:
        chosen = min(range(len(sources)), key=lambda i: num_written[i] / sources[i].weight)
        epoch, segment = next(streams[chosen])
        if chosen == 0 and epoch == epochs:
            return
        num_written[chosen] += len(segment.tokens) if mix_unit == "tokens" else 1
        yield segment
