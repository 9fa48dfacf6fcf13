"""Documents become one long stream of tokens, and the stream fixed-length training rows.

Order, coins and rows depend on (seed, epoch, document) alone; no token is dropped, none is
padded but in the last row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from boltlm.errors import UserError
from boltlm.records import Chunk, Sample, TeacherLatent, read, read_shard, shards
from boltlm.seeds import generator, uniform
from boltlm.sequences import layouts
from boltlm.sequences.layouts import Format, Layout, Pair
from boltlm.tokens import Markers

IGNORED = -100
Latents = Mapping[tuple[str, int], Sequence[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceConfig:
    """Params section `sequences`. Length in tokens."""

    length: int
    layout: Layout

    def __post_init__(self) -> None:
        if self.length < 2:
            raise UserError(f"length must be 2 or more tokens, found {self.length}")


@dataclass(frozen=True, slots=True)
class Text:
    """A document's id and its chunks with their latents."""

    doc_id: str
    pairs: tuple[Pair, ...]


def kept_latents(folder: Path) -> dict[tuple[str, int], tuple[int, ...]]:
    """The latent of each chunk, by (doc_id, chunk): the selected samples of `data/latents/…`, or
    what the teacher wrote in `data/teacher/…`. Raises UserError for another kind of table."""
    kept: dict[tuple[str, int], tuple[int, ...]] = {}
    for path in shards(folder):
        if folder.parent.name == "teacher":
            for latent in read_shard(path, TeacherLatent):
                if latent.tokens is not None:
                    kept[latent.doc_id, latent.chunk] = latent.tokens
        elif folder.parent.name == "latents":
            for sample in read_shard(path, Sample):
                if sample.selected:
                    kept[sample.doc_id, sample.chunk] = sample.tokens
        else:
            raise UserError(f"{folder}: latents come from data/latents/… or data/teacher/…")
    return kept


def texts(chunks: Path, latents: Latents) -> list[Text]:
    """The documents of a corpus, each chunk with its latent where it has one.

    Raises UserError when latents are given and none of them belongs to the corpus.
    """
    found: dict[str, list[Pair]] = {}
    matched = 0
    for chunk in read(chunks, Chunk):
        latent = latents.get((chunk.doc_id, chunk.chunk))
        matched += latent is not None
        found.setdefault(chunk.doc_id, []).append(Pair(chunk.tokens, latent))
    if latents and not matched:
        raise UserError(f"{chunks}: no latent belongs to a chunk of this corpus; see params.yaml")
    return [Text(doc_id, tuple(pairs)) for doc_id, pairs in found.items()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Writer:
    """Writes documents as tokens in one format. `room`: what the window leaves to a context and
    its chunk together, in tokens, as in the E-step."""

    markers: Markers
    form: Format
    layout: Layout
    context_chunks: int
    room: int
    seed: int

    def prior_modes(self, text: Text, epoch: int) -> list[bool]:
        """A fair coin for each chunk, keyed to (seed, epoch, document, chunk)."""
        return [
            uniform(self.seed, "mode", epoch, text.doc_id, index) < 0.5
            for index in range(len(text.pairs))
        ]

    def write(self, text: Text, epoch: int) -> list[list[int]]:
        """The token runs that stand for one document in one epoch."""
        m = self.markers
        if self.form == "raw":
            return [layouts.raw(m, [pair.text for pair in text.pairs])]
        if self.form == "mixed":
            thoughts = [[m.bos, *pair.latent, m.eos] for pair in text.pairs if pair.latent]
            return [[m.bos, *pair.text, m.eos] for pair in text.pairs] + thoughts
        modes = self.prior_modes(text, epoch)
        if self.layout == "document":
            return [layouts.document(m, text.pairs, modes)]
        return [self._row(text, index, modes[index]) for index in range(len(text.pairs))]

    def _row(self, text: Text, index: int, prior_mode: bool) -> list[int]:
        pair = text.pairs[index]
        before = [earlier.text for earlier in text.pairs[:index]]
        context = layouts.context(before, self.context_chunks, self.room - len(pair.text))
        last = index == len(text.pairs) - 1
        return layouts.row(self.markers, context, pair, prior_mode, last)

    def epoch(self, corpus: Sequence[Text], epoch: int) -> np.ndarray:
        """All tokens of one epoch, int32: every run once, runs in this epoch's order."""
        runs = [run for text in corpus for run in self.write(text, epoch)]
        order = generator(self.seed, "epoch", epoch).permutation(len(runs))
        return np.concatenate([np.asarray(runs[i], dtype=np.int32) for i in order])


def stream(
    writer: Writer, corpus: Sequence[Text], *, epochs: int | None, tokens: int | None
) -> np.ndarray:
    """The training stream, int32: so many whole epochs, or so many tokens of as many epochs as
    they take."""
    if (epochs is None) == (tokens is None):
        raise UserError("a budget is either epochs or tokens")
    parts: list[np.ndarray] = []
    total = 0
    while (epochs is not None and len(parts) < epochs) or (tokens is not None and total < tokens):
        parts.append(writer.epoch(corpus, len(parts)))
        total += len(parts[-1])
    return np.concatenate(parts)[:tokens]


def rows(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs_RL, labels_RL) of the stream, already shifted: labels[r, i] follows inputs[r, i].

    Every token but the very first is predicted once. The last row is padded: inputs with 0,
    labels with IGNORED.
    """
    count = -(-(len(tokens) - 1) // length)
    padded = np.full(count * length + 1, IGNORED, dtype=np.int64)
    padded[: len(tokens)] = tokens
    labels = padded[1:].reshape(count, length)
    inputs = padded[:-1].reshape(count, length)
    return np.where(inputs == IGNORED, 0, inputs), labels
