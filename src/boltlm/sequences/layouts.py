"""The token grammar of training sequences and prompts (docs/method.md, 3.1).

    C  context: the raw text of the chunks before X     X  text of a chunk     Z  its latent

    document          = BOS chunk* EOS              layout `document`, the paper's
    chunk-row         = BOS C chunk [EOS]           layout `chunk`; EOS ends a document
    chunk             = prior-chunk | posterior-chunk | no-latent-chunk
    prior-chunk       = SoL Prior Z EoL X           trains p(Z, X | C)
    posterior-chunk   = SoL EoL X SoL Post Z EoL    trains q(Z | X, C)
    no-latent-chunk   = SoL EoL X                   the chunk has no latent

    prior-prompt      = BOS C SoL Prior             continued by Z EoL X
    posterior-prompt  = BOS C SoL EoL X SoL Post    continued by Z EoL
    no-latent-prompt  = BOS C SoL EoL               continued by X

    raw               = BOS X EOS                   without latents or latent marks

A chunk-row begins with the prompt of its mode, so that training and the E-step see the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from boltlm.errors import UserError
from boltlm.param_types import AtLeast
from boltlm.tokens import SpecialTokens

TokenIds = Sequence[int] | np.ndarray
SequenceFormat = Literal["latent", "raw", "mixed", "paraphrase"]
Layout = Literal["document", "chunk"]
DrawChoice = Literal["selected", "resampled", "weighted"]
MixUnit = Literal["tokens", "documents"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceConfig:
    """Section `sequences` of params.yaml. `sequence_length`: of a training sequence, in tokens;
    `context_loss`: whether the layout `chunk` takes the loss on the context C of a row too;
    `mix_unit`: whether `models.<name>.mix_raw` is a share of the tokens or of the documents."""

    sequence_length: Annotated[int, AtLeast(2)]
    layout: Layout
    context_loss: bool
    mix_unit: MixUnit

    def __post_init__(self) -> None:
        if self.layout == "document" and not self.context_loss:
            raise UserError(
                "context_loss must be true with the layout document, in which no token is repeated"
                " as context, found false"
            )


@dataclass(frozen=True, slots=True)
class LatentPair:
    """The text X of a chunk and its latent Z, which is None where the chunk has no latent."""

    text: TokenIds
    latent: TokenIds | None


def prior_prompt(special: SpecialTokens, context: TokenIds) -> list[int]:
    """BOS C SoL Prior, continued by Z EoL X: the condition of p(Z | C), then of p(X | Z, C)."""
    return [special.bos, *context, special.sol, special.prior]


def posterior_prompt(special: SpecialTokens, context: TokenIds, text: TokenIds) -> list[int]:
    """BOS C SoL EoL X SoL Post, continued by Z EoL: the condition of q(Z | X, C)."""
    return [special.bos, *context, special.sol, special.eol, *text, special.sol, special.post]


def no_latent_prompt(special: SpecialTokens, context: TokenIds) -> list[int]:
    """BOS C SoL EoL, continued by X: the condition of p(X | C) without a latent."""
    return [special.bos, *context, special.sol, special.eol]


def prior_chunk(special: SpecialTokens, pair: LatentPair) -> list[int]:
    """SoL Prior Z EoL X: the latent before the text. The pair must have a latent."""
    assert pair.latent is not None
    return [special.sol, special.prior, *pair.latent, special.eol, *pair.text]


def posterior_chunk(special: SpecialTokens, pair: LatentPair) -> list[int]:
    """SoL EoL X SoL Post Z EoL: the latent after the text. The pair must have a latent."""
    assert pair.latent is not None
    text_part = [special.sol, special.eol, *pair.text]
    return [*text_part, special.sol, special.post, *pair.latent, special.eol]


def no_latent_chunk(special: SpecialTokens, pair: LatentPair) -> list[int]:
    """SoL EoL X: the text alone, behind an empty pair of latent marks."""
    return [special.sol, special.eol, *pair.text]


def format_chunk(special: SpecialTokens, pair: LatentPair, prior_mode: bool) -> list[int]:
    """A chunk in prior or posterior mode; one without a latent has only one form."""
    if pair.latent is None:
        return no_latent_chunk(special, pair)
    return prior_chunk(special, pair) if prior_mode else posterior_chunk(special, pair)


def format_document(
    special: SpecialTokens, pairs: Sequence[LatentPair], prior_modes: Sequence[bool]
) -> list[int]:
    """BOS chunk … chunk EOS, each chunk in its own mode: the paper's layout."""
    tokens = [special.bos]
    for pair, prior_mode in zip(pairs, prior_modes, strict=True):
        tokens += format_chunk(special, pair, prior_mode)
    return [*tokens, special.eos]


def format_raw(special: SpecialTokens, text: TokenIds) -> list[TokenIds]:
    """BOS X EOS as three pieces to concatenate, so that a long array of ids is not copied twice."""
    return [[special.bos], text, [special.eos]]


def format_chunk_row(
    special: SpecialTokens,
    context: TokenIds,
    pair: LatentPair,
    prior_mode: bool,
    is_last: bool,
) -> list[int]:
    """BOS C chunk [EOS]: a chunk behind its raw context, as in the E-step. EOS follows the last
    chunk of a document (`is_last`)."""
    end = [special.eos] if is_last else []
    return [special.bos, *context, *format_chunk(special, pair, prior_mode), *end]


def select_context(texts: Sequence[TokenIds], context_chunks: int, token_budget: int) -> list[int]:
    """The context C of a chunk: the concatenated last `context_chunks` of the texts before it.

    While C is longer than `token_budget` tokens, its earliest chunk is dropped; a chunk is never
    cut. C is empty where not even the nearest chunk fits.
    """
    selected = list(texts[max(0, len(texts) - context_chunks) :])
    while selected and sum(map(len, selected)) > token_budget:
        selected.pop(0)
    return [token for text in selected for token in text]
