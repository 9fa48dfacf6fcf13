"""How many tokens of raw text each training sequence of a packed stream has as targets.

Raw text is the text X of the chunks, without latents, special tokens and the context C in front of
a chunk: in an epoch each token of the corpus counts once, whatever the format. Paraphrases are no
raw text. With `draws: weighted` the text of a chunk counts with each of its latents.
"""

from pathlib import Path

import numpy as np

from boltlm.sequences.store import open_array
from boltlm.shard_store import atomic_write
from boltlm.tokens import SpecialTokens

RAW_COUNTS_FILE = "raw_counts"
_COUNT_DTYPE = np.dtype(np.int32)
_BLOCK = 1 << 20  # tokens whose counts are made at once


class RawTokenCounter:
    """Counts the tokens of raw text in the segments of a stream, by the row in which each is a
    target: row i has the targets i L + 1 … (i + 1) L, where L is `sequence_length`."""

    def __init__(self, special_tokens: SpecialTokens, sequence_length: int) -> None:
        self.special_tokens, self.sequence_length = special_tokens, sequence_length
        self.counts: list[np.ndarray] = []
        self.pending: list[np.ndarray] = []  # whether a token is raw text, of incomplete rows
        self.num_pending = -1  # the first token of the stream is no target

    def add(self, segment: np.ndarray, *, has_text: bool) -> None:
        """Count the next segment of the stream. `has_text`: false if none of it is raw text."""
        is_text = text_mask(self.special_tokens, segment) if has_text else np.zeros(len(segment))
        self.pending.append(is_text.astype(bool))
        self.num_pending += len(segment)
        if self.num_pending >= _BLOCK:
            self._count_rows()

    def write(self, folder: Path) -> None:
        """Write the counts of the complete stream."""
        self.pending.append(np.zeros(-self.num_pending % self.sequence_length, bool))
        self.num_pending += len(self.pending[-1])
        self._count_rows()
        with atomic_write(folder / RAW_COUNTS_FILE) as temporary:
            np.concatenate(self.counts).tofile(temporary)

    def _count_rows(self) -> None:
        """Count the complete rows; what remains is pending."""
        is_text = np.concatenate(self.pending)[0 if self.counts else 1 :]
        num_complete = len(is_text) // self.sequence_length * self.sequence_length
        rows_RL = is_text[:num_complete].reshape(-1, self.sequence_length)
        self.counts.append(rows_RL.sum(1, dtype=_COUNT_DTYPE))
        self.pending = [is_text[num_complete:]]
        self.num_pending = len(is_text) - num_complete


def text_mask(special: SpecialTokens, segment: np.ndarray) -> np.ndarray:
    """Which tokens of a segment are raw text. In a segment with latent marks they follow EoL: what
    is before the first mark is context, and what follows Prior or Post is a latent."""
    ids = np.maximum(segment, ~segment)
    is_eol = ids == special.eol
    is_mark = is_eol | (ids == special.sol) | (ids == special.prior) | (ids == special.post)
    is_text = ~is_mark & (ids != special.bos) & (ids != special.eos)
    if is_mark.any():
        last_mark = np.maximum.accumulate(np.where(is_mark, np.arange(len(ids)), 0))
        is_text &= is_eol[last_mark]
    return is_text


def read_raw_counts(folder: Path) -> np.ndarray | None:
    """The counts of a packed folder by row, None where they were not wanted."""
    path = folder / RAW_COUNTS_FILE
    return open_array(path, _COUNT_DTYPE) if path.is_file() else None
