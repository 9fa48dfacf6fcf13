"""Packing: documents become one stream of tokens, cut into training sequences of equal length.

Segments (`boltlm.sequences.formatter`) are shuffled and concatenated into the stream
(docs/method.md, 3.3). No token is dropped, and only the end of the stream is padded. In the stream,
a token without a loss is the complement ~id of its id, which is negative. With `draws: weighted`
(3.5) a second file has the weight of every token in the loss. Orders depend on (seed, epoch) alone.
The files and the orders are memory-mapped: memory does not grow with the corpus, and the batch of
any step is read directly.

Shape suffixes: B sequences of a batch, L sequence length, T = L + 1.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from boltlm.errors import UserError
from boltlm.seeds import generator
from boltlm.sequences.layouts import MixUnit
from boltlm.sequences.mixing import Segment, SequenceSource, interleave, permutation
from boltlm.sequences.raw_counts import RawTokenCounter, read_raw_counts
from boltlm.sequences.store import open_array
from boltlm.shard_store import atomic_write

IGNORE_INDEX = -100  # the label of positions without a loss, as in torch's cross-entropy
STREAM_FILE = "stream"
WEIGHTS_FILE = "loss_weights"
WEIGHT_DTYPE = np.dtype(np.float32)
STATS_FILE = "stats.json"  # written last: without it, a folder is incomplete


@dataclass(frozen=True, slots=True)
class PackedDataset:
    """The training sequences of a packed stream, in a shuffled order. `tokens`: the stream, with
    ~id for a token without a loss; `digest`: a hash of it and of `loss_weights`, the
    weights of its tokens in the loss, float32; None: each is 1. `mean_weight`: their mean.
    `raw_counts`: the targets of each row that are raw text; None: they were not counted."""

    tokens: np.ndarray
    sequence_length: int
    order: np.ndarray
    digest: str
    loss_weights: np.ndarray | None = None
    mean_weight: float = 1.0
    raw_counts: np.ndarray | None = None

    def __len__(self) -> int:
        """The number of training sequences."""
        return len(self.order)

    def batch(self, step: int, batch_size: int) -> tuple[np.ndarray, ...]:
        """(inputs_BL, labels_BL) of a step, int64, and weights_BL, float32, those of the labels in
        the loss over their mean, where the stream has weights. The last batch may be smaller.

        Already shifted: labels_BL[b, i] is the token after inputs_BL[b, i], or IGNORE_INDEX where
        that token has no loss. Over all batches, every token with a loss but the stream's first is
        a label once. The end of the stream is padded with tokens 0 without a loss.
        """
        indices = self.order[step * batch_size : (step + 1) * batch_size]
        tokens_BT = self._rows(self.tokens, indices, np.dtype(np.int64), ~0)
        ids_BT = np.maximum(tokens_BT, ~tokens_BT)
        labels_BT = np.where(tokens_BT < 0, IGNORE_INDEX, tokens_BT)
        if self.loss_weights is None:
            return ids_BT[:, :-1], labels_BT[:, 1:]
        weights_BT = self._rows(self.loss_weights, indices, WEIGHT_DTYPE, 0)
        return ids_BT[:, :-1], labels_BT[:, 1:], weights_BT[:, 1:] / np.float32(self.mean_weight)

    def num_target_tokens(self, first_step: int, batch_size: int) -> int:
        """How many tokens the loss is taken on from a step to the end."""
        indices = self.order[first_step * batch_size :]
        return sum(int((self._row(self.tokens, i)[1:] >= 0).sum()) for i in indices)

    def num_raw_tokens(self, steps: int, batch_size: int) -> int:
        """How many targets of the first `steps` steps are raw text (`sequences.raw_counts`)."""
        assert self.raw_counts is not None
        return int(self.raw_counts[self.order[: steps * batch_size]].sum(dtype=np.int64))

    def _rows(
        self, values: np.ndarray, indices: np.ndarray, dtype: np.dtype, padding: int
    ) -> np.ndarray:
        """Training sequences with the token after each, of shape BT."""
        rows_BT = np.full((len(indices), self.sequence_length + 1), padding, dtype)
        for row_T, index in zip(rows_BT, indices, strict=True):
            values_of_row = self._row(values, index)
            row_T[: len(values_of_row)] = values_of_row
        return rows_BT

    def _row(self, values: np.ndarray, index: int) -> np.ndarray:
        """The tokens (or their weights) of a training sequence and the one after it; fewer at the
        stream's end."""
        start = index * self.sequence_length
        return values[start : start + self.sequence_length + 1]


def pack_sequences(
    sources: Callable[[Path], Sequence[SequenceSource]],
    folder: Path,
    *,
    sequence_length: int,
    seed: int,
    vocab_size: int,
    epochs: int | None,
    tokens: Callable[[Sequence[SequenceSource], Path], int] | int | None,
    count_raw_tokens: bool = False,
    mix_unit: MixUnit = "tokens",
) -> PackedDataset:
    """The training sequences of `epochs` epochs of the first source, or of `tokens` tokens.
    `mix_unit` as in `interleave`.

    The stream is written into `folder` unless it is complete there; only then are the sources
    made, `sources(folder)`, and a number of tokens computed from them, `tokens(sources, folder)`.
    `count_raw_tokens`: whether the dataset has `raw_counts`; all runs on a folder want the same.
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
        segments = interleave(opened, folder, epochs, mix_unit)
        counter = None
        if count_raw_tokens:
            counter = RawTokenCounter(opened[0].formatter.special_tokens, sequence_length)
        _write_stream(opened, segments, folder, max_tokens, dtype, counter)
    return open_packed(folder, sequence_length, seed)


def _write_stream(
    sources: Sequence[SequenceSource],
    segments: Iterator[Segment],
    folder: Path,
    max_tokens: int | None,
    dtype: np.dtype,
    counter: RawTokenCounter | None,
) -> None:
    """Write the segments of the sources as the stream, its weights where a source has any, counts,
    and then its statistics."""
    num_tokens, total_weight = 0, 0.0
    has_weights = any(source.formatter.draws == "weighted" for source in sources)
    with ExitStack() as stack:
        names = [STREAM_FILE, WEIGHTS_FILE] if has_weights else [STREAM_FILE]
        files = [stack.enter_context((folder / name).open("wb")) for name in names]
        digests = [_new_digest() for _ in names]
        for segment, loss_weight, has_text in segments:
            ids = segment if max_tokens is None else segment[: max_tokens - num_tokens]
            if counter is not None:
                counter.add(ids, has_text=has_text)
            arrays = [ids.astype(dtype)]
            if has_weights:
                arrays.append(np.full(len(ids), loss_weight, WEIGHT_DTYPE))
            for file, digest, array in zip(files, digests, arrays, strict=True):
                data = array.tobytes()
                file.write(data)
                digest.update(data)
            num_tokens += len(ids)
            total_weight += loss_weight * len(ids)
            if num_tokens == max_tokens:
                break
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    stats: dict[str, int | float | str] = {
        "tokens": num_tokens,
        "dtype": dtype.str,
        "digest": digests[0].hexdigest(),
    }
    if has_weights:
        stats |= {
            "weights_digest": digests[1].hexdigest(),
            "mean_weight": total_weight / num_tokens,
        }
    stats |= sources[0].store.counts()
    if counter is not None:
        counter.write(folder)
    with atomic_write(folder / STATS_FILE) as temporary:
        temporary.write_text(json.dumps(stats), encoding="utf-8")


def _new_digest() -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=16)


def _is_packed(folder: Path) -> bool:
    """Whether a folder has its statistics, and files with the digests that they state."""
    if not (folder / STATS_FILE).is_file():
        return False
    stats = packing_stats(folder)
    digests = {STREAM_FILE: stats["digest"], WEIGHTS_FILE: stats.get("weights_digest")}
    return all(
        digest is None or _has_digest(folder / name, str(digest))
        for name, digest in digests.items()
    )


def _has_digest(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, _new_digest).hexdigest() == digest


def packing_stats(folder: Path) -> dict[str, int | float | str]:
    """Tokens, dtype and digest of a packed stream, digest and mean of its weights where it has any,
    and the counts of its first source's store."""
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
    stream = open_array(folder / STREAM_FILE, np.dtype(str(stats["dtype"])))
    has_weights = "weights_digest" in stats
    weights = open_array(folder / WEIGHTS_FILE, WEIGHT_DTYPE) if has_weights else None
    num_sequences = -(-(len(stream) - 1) // sequence_length)
    order = permutation(num_sequences, generator(seed, "rows"), folder)
    mean_weight = float(stats.get("mean_weight", 1))
    digest = f"{stats['digest']}{stats.get('weights_digest', '')}"
    counts = read_raw_counts(folder)
    return PackedDataset(stream, sequence_length, order, digest, weights, mean_weight, counts)
