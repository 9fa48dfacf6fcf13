"""The order of tokens, in one place: training documents, and the prompts that match them.

SPEC sections 3 and 4. Letters: C context (raw text of the L chunks before), X chunk, Z latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from boltlm.tokens import Markers

Ids = Sequence[int] | np.ndarray
Format = Literal["latent", "raw", "mixed", "paraphrase"]
Layout = Literal["document", "chunk"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A chunk and its latent; `latent` is None where every draw failed or there is none."""

    text: Ids
    latent: Ids | None


def prior_prefix(m: Markers, context: Ids) -> list[int]:
    """BOS C SoL Prior: what log p(Z, EoL | …) and then log p(X | …) continue."""
    return [m.bos, *context, m.sol, m.prior]


def posterior_prefix(m: Markers, context: Ids, text: Ids) -> list[int]:
    """BOS C SoL EoL X SoL Post: what q(Z, EoL | …) continues."""
    return [m.bos, *context, m.sol, m.eol, *text, m.sol, m.post]


def bare_prefix(m: Markers, context: Ids) -> list[int]:
    """BOS C SoL EoL: what a chunk continues that comes without a latent before it."""
    return [m.bos, *context, m.sol, m.eol]


def prior_chunk(m: Markers, pair: Pair) -> list[int]:
    assert pair.latent is not None
    return [m.sol, m.prior, *pair.latent, m.eol, *pair.text]


def posterior_chunk(m: Markers, pair: Pair) -> list[int]:
    assert pair.latent is not None
    return [m.sol, m.eol, *pair.text, m.sol, m.post, *pair.latent, m.eol]


def bare_chunk(m: Markers, pair: Pair) -> list[int]:
    return [m.sol, m.eol, *pair.text]


def chunk(m: Markers, pair: Pair, prior_mode: bool) -> list[int]:
    """One chunk in its mode; without a latent it is the empty pair and the text."""
    if pair.latent is None:
        return bare_chunk(m, pair)
    return prior_chunk(m, pair) if prior_mode else posterior_chunk(m, pair)


def document(m: Markers, pairs: Sequence[Pair], prior_modes: Sequence[bool]) -> list[int]:
    """BOS, every chunk in its mode, EOS: the paper's layout."""
    tokens = [m.bos]
    for pair, prior_mode in zip(pairs, prior_modes, strict=True):
        tokens += chunk(m, pair, prior_mode)
    return [*tokens, m.eos]


def raw(m: Markers, text: Ids) -> list[Ids]:
    """BOS text EOS, the three to be joined: a text may be an array."""
    return [[m.bos], text, [m.eos]]


def context(texts: Sequence[Ids], chunks: int, room: int) -> list[int]:
    """Raw text of the last `chunks` texts; from the left, whole texts are dropped until what
    is left has at most `room` tokens."""
    kept = list(texts[max(0, len(texts) - chunks) :])
    while kept and sum(map(len, kept)) > room:
        kept.pop(0)
    return [token for text in kept for token in text]


def row(m: Markers, before: Ids, pair: Pair, prior_mode: bool, last: bool) -> list[int]:
    """BOS, raw context, one chunk in its mode, and EOS after a document's last: as the E-step
    sees it."""
    return [m.bos, *before, *chunk(m, pair, prior_mode), *([m.eos] if last else [])]
