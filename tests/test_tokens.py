"""Text never becomes a special token, whatever kind of tokenizer a model has."""

import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from boltlm.tokens import SPECIAL_TOKENS, TextCoder
from tests import tiny

STORIES = tiny.SHARED / "models" / "stories260K"
BOS, EOS = "<s>", "</s>"
TEXTS = ["It is three.", "one two three", "A dial, from 8 to 1: it stops."]


def byte_level(bos: str, eos: str, *, special: bool = True) -> Tokenizer:
    """As GPT-2's: bytes, no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken(text, special=special) for text in (bos, eos)])
    return tokenizer


def llama() -> Tokenizer:
    """As Llama's: pieces of SentencePiece with byte fallback, BOS and EOS among the pieces."""
    letters = sorted(set("".join(TEXTS)) | set("<|>/saltenpriors"))
    pieces = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([BOS, EOS, "<unk>"])
    return tokenizer


def stories() -> Tokenizer:
    """A real one, of a small Llama."""
    if not STORIES.is_dir():
        pytest.skip("the checkpoint stories260K is not on this machine")
    return Tokenizer.from_file(str(STORIES / "tokenizer.json"))


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: byte_level(BOS, EOS),
    "gpt-2": lambda: byte_level("<|endoftext|>", "<|endoftext|>"),
    "llama": llama,
    "added, not special": lambda: byte_level("<|im_start|>", "<|im_end|>", special=False),
    "stories260K": stories,
}


def special_strings(tokenizer: Tokenizer) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
def test_no_text_becomes_a_special_token(kind: str, special: bool, tmp_path: Path) -> None:
    """Every special string of every tokenizer, alone and inside a text, one by one and in a batch;
    the text can be read back."""
    tokenizer = TOKENIZERS[kind]()
    own = special_strings(tokenizer) or [BOS, EOS]
    tokenizer.add_tokens([AddedToken(text, special=special) for text in SPECIAL_TOKENS])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    bos, eos = tokenizer.token_to_id(own[0]), tokenizer.token_to_id(own[-1])
    config = {"max_position_embeddings": 64, "bos_token_id": bos, "eos_token_id": eos}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    coder = TextCoder(tmp_path)
    forbidden = {*astuple(coder.special_tokens)}
    strings = [*own, *SPECIAL_TOKENS]
    texts = [*strings, *(f"one{text}two {text}" for text in strings), "".join(strings)]
    for text, batched in zip(texts, coder.encode_batch(texts), strict=True):
        encoded = coder.encode(text)
        assert not forbidden & {*encoded}, text
        assert encoded == list(batched)
        assert coder.decode(encoded).replace(" ", "") == text.replace(" ", "")
