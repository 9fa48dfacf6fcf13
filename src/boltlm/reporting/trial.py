"""A few documents tried out before an experiment: what the model knows of the text, and an E-step
on them, as text for the terminal (`boltlm try`)."""

import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from boltlm.errors import UserError
from boltlm.estep.config import EStepSettings
from boltlm.estep.contexts import chunks_in_context
from boltlm.estep.diagnostics import WeightDiagnostics
from boltlm.estep.importance import normalized_weights
from boltlm.estep.shard_worker import build_estep, context_token_budget
from boltlm.evaluation.likelihood import chunk_nlls
from boltlm.records import Chunk, Sample, read_shard, shard_paths

_MANY_TOKENS_PER_WORD = 2.5
_WIDTH = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """The text to show; the share of draws whose end was forced at the limit."""

    text: str
    forced_fraction: float


def first_chunks(folder: Path, documents: int) -> list[Chunk]:
    """The chunks of the first documents of a corpus. Raises UserError where there is none."""
    if not any(folder.glob("*.parquet")):
        raise UserError(f"{folder}: no *.parquet in it; make it with: dvc repro split")
    chunks = read_shard(shard_paths(folder)[0], Chunk)
    groups = itertools.groupby(chunks, lambda chunk: chunk.doc_id)
    return [chunk for _, group in itertools.islice(groups, documents) for chunk in group]


def try_estep(
    settings: EStepSettings,
    *,
    model: Path,
    chunks: Sequence[Chunk],
    shown: int,
    has_latents: bool,
) -> Trial:
    """An E-step on a few chunks, `shown` of them printed. `has_latents`: whether the model was
    trained with latents."""
    estep = build_estep(settings, model, purpose="trial")
    budget = context_token_budget(estep.coder, settings.max_latent_tokens)
    in_context = chunks_in_context(chunks, settings.context_chunks, budget)
    nll = chunk_nlls(
        estep.model, estep.special_tokens, in_context, has_latents, settings.sampling.batch_tokens
    )
    vocabulary = estep.coder.tokenizer.get_vocab_size()
    lines = [_text_facts(chunks, sum(nll.values()), vocabulary, model)]
    groups = estep.run(in_context, settings.num_samples)
    numbers = WeightDiagnostics(groups).diagnostics()
    for chunk, group in list(zip(chunks, groups, strict=True))[:shown]:
        lines.append(_chunk_text(chunk, group))
    forced = numbers["forced_fraction"]
    lines.append(
        f"E-step: {len(groups)} chunks × K = {settings.num_samples};"
        f" {numbers['latent_tokens_mean']:.0f} tokens in a latent, limit"
        f" {settings.max_latent_tokens}; {forced:.0%} of the draws cut at the limit; effective"
        f" sample size {numbers['ess_mean']:.2f} of {settings.num_samples}"
    )
    return Trial(text="\n\n".join(lines), forced_fraction=forced)


def _text_facts(chunks: Sequence[Chunk], nll: float, vocabulary: int, model: Path) -> str:
    """How well the model knows the text, in words."""
    counts = Counter(token for chunk in chunks for token in chunk.tokens)
    tokens, words = counts.total(), sum(len(chunk.text.split()) for chunk in chunks)
    unigram = -sum(n * math.log(n / tokens) for n in counts.values()) / tokens
    per_token, per_word = nll / tokens, tokens / max(words, 1)
    line = (
        f"{model}: {per_token:.2f} nats a token on {tokens:,} tokens of this text; a uniform choice"
        f" has {math.log(vocabulary):.2f}, the frequencies of these tokens {unigram:.2f}."
    )
    if per_token > unigram:
        line += (
            " The model knows less of the text than its token frequencies: it is untrained for it,"
            " or too small. Train it longer (base.epochs, corpora.base) or take another --model."
        )
    if per_word > _MANY_TOKENS_PER_WORD:
        line += (
            f" A word has {per_word:.1f} tokens: the tokenizer does not fit the text; raise"
            " base.vocab_size or take another model."
        )
    return textwrap.fill(line, _WIDTH)


def _chunk_text(chunk: Chunk, group: Sequence[Sample]) -> str:
    weights = normalized_weights(np.array([sample.log_weight for sample in group]))
    lines = [f"── {chunk.doc_id}, chunk {chunk.chunk}", _indented(chunk.text, "   ")]
    for sample, weight in zip(group, weights, strict=True):
        mark = "→" if sample.selected else " "
        end = "" if sample.finish == "stop" else " …(cut at the limit)"
        lines.append(_indented(f"{sample.latent}{end}", f" {mark} {weight:4.2f} "))
    return "\n".join(lines)


def _indented(text: str, first: str) -> str:
    filled = textwrap.fill(
        " ".join(text.split()), _WIDTH, initial_indent=first, subsequent_indent=" " * len(first)
    )
    return filled or first
