"""Tokenizers of base models: training a BPE, and making a SentencePiece-style one lossless."""

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from boltlm.tokens import SPECIAL_TOKENS

BOS_TEXT, EOS_TEXT = "<|begin|>", "<|end|>"


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit, with the space before it, is a token.

    `vocab_size` includes the special tokens of boltlm.tokens, which are added later.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        special_tokens=[BOS_TEXT, EOS_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS_TEXT, eos_token=EOS_TEXT
    )


def remove_leading_space(tokenizer: PreTrainedTokenizerFast) -> None:
    """Remove the steps of a SentencePiece-style tokenizer that add a space before every text and
    strip one on decoding, so that the decoded chunks of a document join to its text."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for component in ("normalizer", "pre_tokenizer", "decoder"):
        state[component] = _without_leading_space(state[component])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _without_leading_space(component: dict[str, Any] | None) -> dict[str, Any] | None:
    if component is None:
        return None
    if component["type"] == "Sequence":
        key = next(key for key in ("normalizers", "pretokenizers", "decoders") if key in component)
        steps = [step for step in map(_without_leading_space, component[key]) if step is not None]
        return {**component, key: steps} if steps else None
    if component["type"] in ("Prepend", "Strip"):
        return None
    if component["type"] == "Metaspace":
        return {**component, "prepend_scheme": "never"}
    if component["type"] == "ByteLevel" and component.get("add_prefix_space"):
        return {**component, "add_prefix_space": False}
    return component
