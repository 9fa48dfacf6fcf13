"""Documents become one long stream of tokens, and the stream fixed-length training rows.

Order, coins and rows depend on (seed, epoch, document) alone; no token is dropped, none is
padded but in the last row. Stream and orders are memory-mapped files: memory does not grow with
the corpus, and the rows of any step are found from the seed and the step.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from boltlm import engine
from boltlm.errors import UserError
from boltlm.seeds import generator, uniform
from boltlm.sequences import layouts
from boltlm.sequences.layouts import Format, Ids, Layout
from boltlm.sequences.store import PLACES, Store
from boltlm.tokens import Markers

IGNORED = -100
PIECE = 1 << 20  # numbers written at once
FACTS = "facts.json"  # written last: a folder without it is not finished


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceConfig:
    """Params section `sequences`. Length in tokens."""

    length: int
    layout: Layout

    def __post_init__(self) -> None:
        if self.length < 2:
            raise UserError(f"length must be 2 or more tokens, found {self.length}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Writer:
    """Writes documents as runs of tokens in one format. `room`: what the window leaves to a
    context and its chunk together, in tokens, as in the E-step."""

    markers: Markers
    form: Format
    layout: Layout
    context_chunks: int
    room: int
    seed: int

    def prior_modes(self, doc_id: str, chunks: int, epoch: int) -> list[bool]:
        """A fair coin for each chunk, keyed to (seed, epoch, document, chunk)."""
        return [self.prior_mode(doc_id, index, epoch) for index in range(chunks)]

    def prior_mode(self, doc_id: str, index: int, epoch: int) -> bool:
        return uniform(self.seed, "mode", epoch, doc_id, index) < 0.5

    def runs(self, store: Store) -> int:
        """How many runs an epoch has; run i stands for document i, for chunk i in the layout
        `chunk`, and when mixed for chunk i or, beyond, for one of the latents."""
        if self.form == "mixed":
            return 2 * store.chunks
        by_chunk = self.form == "latent" and self.layout == "chunk"
        return store.chunks if by_chunk else len(store)

    def run(self, store: Store, index: int, epoch: int) -> list[Ids]:
        """One run of an epoch, in pieces to be joined; none for a latent that is not there."""
        m = self.markers
        if self.form == "mixed":
            if index < store.chunks:
                return layouts.raw(m, store.text(index, index + 1))
            latent = store.latent(index - store.chunks)
            return layouts.raw(m, latent) if latent else []
        if self.form == "latent" and self.layout == "chunk":
            return [self._row(store, index, epoch)]
        first, end = store.documents[index : index + 2]
        if self.form in ("raw", "paraphrase"):
            return layouts.raw(m, store.text(first, end))
        modes = self.prior_modes(store.name(index), end - first, epoch)
        return [layouts.document(m, [store.pair(chunk) for chunk in range(first, end)], modes)]

    def _row(self, store: Store, chunk: int, epoch: int) -> list[int]:
        document = store.document_of(chunk)
        first, end = (int(place) for place in store.documents[document : document + 2])
        pair = store.pair(chunk)
        before = [
            store.text(earlier, earlier + 1).tolist()
            for earlier in range(max(first, chunk - self.context_chunks), chunk)
        ]
        context = layouts.context(before, self.context_chunks, self.room - len(pair.text))
        prior_mode = self.prior_mode(store.name(document), chunk - first, epoch)
        return layouts.row(self.markers, context, pair, prior_mode, chunk == end - 1)


@dataclass(frozen=True, slots=True)
class Source:
    """Stored documents, how they are written, and their share of the stream's tokens. `beside`:
    what tells the order of a further source from the first's."""

    store: Store
    writer: Writer
    weight: float = 1.0
    beside: tuple[str, ...] = ()

    def epoch(self, epoch: int, scratch: Path) -> Iterator[np.ndarray]:
        """The runs of one epoch, int32, in its order, every one once."""
        for index in _shuffled(
            self.writer.runs(self.store),
            generator(self.writer.seed, "epoch", epoch, *self.beside),
            scratch,
        ):
            pieces = self.writer.run(self.store, int(index), epoch)
            if pieces:
                yield np.concatenate(pieces, dtype=np.int32, casting="same_kind")

    def epochs(self, scratch: Path) -> Iterator[tuple[int, np.ndarray]]:
        """Epoch and run, for ever."""
        if not self.writer.runs(self.store):
            raise UserError("the corpus has no documents; see params.yaml")
        epoch = 0
        while True:
            for run in self.epoch(epoch, scratch):
                yield epoch, run
            epoch += 1

    def tokens(self, epochs: int, scratch: Path) -> int:
        """How many tokens so many epochs have."""
        return sum(len(run) for epoch in range(epochs) for run in self.epoch(epoch, scratch))


def _shuffled(count: int, random: np.random.Generator, folder: Path) -> np.ndarray:
    """0 … count − 1 in the order of `random.permutation`, in a file without a name, whose pages
    the system may drop from memory."""
    if not count:
        return np.zeros(0, PLACES)
    with TemporaryFile(dir=folder) as file:
        for start in range(0, count, PIECE):  # written, not mapped: a full disk is an error here
            file.write(np.arange(start, min(start + PIECE, count), dtype=PLACES).tobytes())
        file.flush()
        order = np.asarray(np.memmap(file, PLACES, mode="r+"))
    random.shuffle(order)
    return order


def interleave(
    sources: Sequence[Source], scratch: Path, epochs: int | None
) -> Iterator[np.ndarray]:
    """Runs of the sources, each time from the one that is furthest behind its weight; ends when
    the first source has had so many epochs, or never."""
    endless = [source.epochs(scratch) for source in sources]
    written = [0.0] * len(sources)
    while True:
        place = min(range(len(sources)), key=lambda i: written[i] / sources[i].weight)
        epoch, run = next(endless[place])
        if place == 0 and epoch == epochs:
            return
        written[place] += len(run)
        yield run


@dataclass(frozen=True, slots=True)
class Rows:
    """The training rows of a stream that `pack` wrote, in their shuffled order."""

    tokens: np.ndarray
    length: int
    order: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, step: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs_BL, labels_BL), int64, of step `step` with `count` rows a step, fewer in the
        last. Already shifted: labels[b, i] follows inputs[b, i]. Every token but the stream's
        very first is predicted once; the stream's end is padded, inputs with 0, labels with
        IGNORED."""
        rows = self.order[step * count : (step + 1) * count]
        both = np.full((len(rows), self.length + 1), IGNORED, dtype=np.int64)
        for place, row in enumerate(rows):
            found = self.tokens[row * self.length : (row + 1) * self.length + 1]
            both[place, : len(found)] = found
        inputs, labels = both[:, :-1], both[:, 1:]
        return np.where(inputs == IGNORED, 0, inputs), labels

    def predicted(self, first_step: int, count: int) -> int:
        """How many tokens are predicted from a step on."""
        left = self.order[first_step * count :]
        if not len(left):
            return 0
        last = len(self.order) - 1
        short = len(self) * self.length - (len(self.tokens) - 1)
        return len(left) * self.length - (short if (left == last).any() else 0)


def pack(
    sources: Callable[[Path], Sequence[Source]],
    folder: Path,
    *,
    length: int,
    seed: int,
    vocabulary: int,
    epochs: int | None,
    tokens: Callable[[Sequence[Source], Path], int] | int | None,
) -> Rows:
    """The rows of so many epochs of the first source, or of so many tokens; built in `folder`
    where they are not there yet from the sources that the call stores there."""
    if (epochs is None) == (tokens is None):
        raise UserError("a budget is either epochs or tokens")
    if not _is_whole(folder):
        folder.mkdir(parents=True, exist_ok=True)
        found = sources(folder)
        most = tokens(found, folder) if callable(tokens) else tokens
        _write(found, folder, epochs, most, np.dtype(np.uint16 if vocabulary <= 1 << 16 else "i4"))
    return open_rows(folder, length, seed)


def _write(
    sources: Sequence[Source], folder: Path, epochs: int | None, most: int | None, dtype: np.dtype
) -> None:
    """Write the stream, its digest and its facts."""
    digest = hashlib.blake2b(digest_size=16)
    total = 0
    with (folder / "stream").open("wb") as file:
        for run in interleave(sources, folder, epochs):
            left = run if most is None else run[: most - total]
            data = left.astype(dtype).tobytes()
            file.write(data)
            digest.update(data)
            total += len(left)
            if total == most:
                break
        file.flush()
        os.fsync(file.fileno())
    facts = {"tokens": total, "dtype": dtype.str, "digest": digest.hexdigest()}
    facts |= sources[0].store.facts()
    with engine.whole(folder / FACTS) as part:
        part.write_text(json.dumps(facts), encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    """Whether a packed folder is finished, and its stream as long as it was then."""
    if not (folder / FACTS).is_file():
        return False
    known = facts(folder)
    length = int(known["tokens"]) * np.dtype(str(known["dtype"])).itemsize
    return (folder / "stream").stat().st_size == length


def facts(folder: Path) -> dict[str, int | str]:
    """What is known of a packed folder: its tokens, and the first source's counts."""
    return json.loads((folder / FACTS).read_text(encoding="utf-8"))


def open_rows(folder: Path, length: int, seed: int) -> Rows:
    """The rows of a packed folder, in the order of (seed). Raises UserError where there is none."""
    known = facts(folder)
    if int(known["tokens"]) < 2:
        raise UserError(
            "the budget leaves no token to predict; see params.yaml, models.<name>.budget"
        )
    stream = np.asarray(np.memmap(folder / "stream", np.dtype(str(known["dtype"])), mode="r"))
    count = -(-(len(stream) - 1) // length)
    order = _shuffled(count, generator(seed, "rows"), folder)
    return Rows(stream, length, order, str(known["digest"]))
