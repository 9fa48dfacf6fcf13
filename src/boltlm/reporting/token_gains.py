"""What each token of a chunk gains by the selected latent: log p(X | Z, C) − log p(X | C).

Shapes: L tokens of a chunk's text.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from boltlm.checkpoint import final_weights, load_model
from boltlm.estep.config import SamplingConfig
from boltlm.estep.contexts import chunks_in_context
from boltlm.estep.scoring import token_log_probs
from boltlm.records import Chunk
from boltlm.sequences import layouts
from boltlm.tokens import TextCoder, chunk_token_budget


class TextScores(NamedTuple):
    """log p of each token of a chunk's text, shape (L,), in nats: behind the selected latent, and
    behind the empty pair of latent marks."""

    with_latent: np.ndarray
    without_latent: np.ndarray


def score_text(
    model_folder: Path,
    chunks: Sequence[Chunk],
    latents: Mapping[tuple[str, int], Sequence[int]],
    *,
    context_chunks: int,
    max_latent_tokens: int,
    sampling: SamplingConfig,
) -> dict[tuple[str, int], TextScores]:
    """The scores of every chunk that `latents` has a latent for, by (doc_id, chunk), in the
    contexts of the E-step. `chunks`: those of whole documents, in reading order.

    Raises UserError where the folder holds no model.
    """
    weights = final_weights(model_folder)
    coder = TextCoder(weights)
    special = coder.special_tokens
    model = load_model(weights, sampling.precision)
    budget = chunk_token_budget(coder.context_length, max_latent_tokens)
    scored = [
        chunk
        for chunk in chunks_in_context(chunks, context_chunks, budget)
        if (chunk.doc_id, chunk.chunk) in latents
    ]
    prefixes: list[list[int]] = []
    for chunk in scored:
        latent = latents[chunk.doc_id, chunk.chunk]
        prefixes.append([*layouts.prior_prompt(special, chunk.context), *latent, special.eol])
        prefixes.append(layouts.no_latent_prompt(special, chunk.context))
    branches = [[chunk.text] for chunk in scored for _ in range(2)]
    scores = token_log_probs(model, prefixes, branches, sampling.batch_tokens)
    log_probs = [log_probs_L for (log_probs_L,) in scores]
    return {
        (chunk.doc_id, chunk.chunk): TextScores(log_probs[2 * i], log_probs[2 * i + 1])
        for i, chunk in enumerate(scored)
    }


def token_pieces(coder: TextCoder, text: str, tokens: Sequence[int]) -> list[str]:
    """The characters of `text` that each of its tokens completes; joined they are the text. A token
    that ends inside a character has none of its own."""
    decoded = [coder.decode(list(tokens[: index + 1])) for index in range(len(tokens) - 1)]
    ends = [_common_length(text, prefix) for prefix in decoded]
    ends = [0, *np.maximum.accumulate(ends).tolist(), len(text)] if ends else [0, len(text)]
    return [text[start:end] for start, end in pairwise(ends)]


def _common_length(one: str, other: str) -> int:
    """The number of characters that two texts begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
