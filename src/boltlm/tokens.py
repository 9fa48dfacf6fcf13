"""Lossless text ↔ token ids, and the ids of the special tokens (docs/method.md, 2.3 and 2.4).

Reads `tokenizer.json` and `config.json` of a model folder with the tokenizers library alone, so
that stages which only need ids start fast.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from boltlm.errors import UserError

SOL, EOL, PRIOR, POST = "<|latent|>", "<|/latent|>", "<|prior|>", "<|posterior|>"
SPECIAL_TOKENS = (SOL, EOL, PRIOR, POST)
# Where a model's config.json has the length of its context window; GPT-2 has the second.
CONTEXT_LENGTH_KEYS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialTokens:
    """Token ids: beginning and end of a document, start and end of a latent, the two modes."""

    bos: int
    eos: int
    sol: int
    eol: int
    prior: int
    post: int

    @property
    def barred(self) -> tuple[int, ...]:
        """The special tokens that cannot be drawn in a latent: all but EoL, which ends it."""
        return (self.bos, self.eos, self.sol, self.prior, self.post)


class TextCoder:
    """The tokenizer of a model folder. Every text is encoded alone, no token is added to it, and
    text that looks like a special token is encoded as text."""

    def __init__(self, model: Path) -> None:
        tokenizer_path, config_path = model / "tokenizer.json", model / "config.json"
        for path in (tokenizer_path, config_path):
            if not path.is_file():
                raise UserError(f"{path}: no such file; run the stage 'base' (dvc repro base)")
        self.model = model
        try:
            self.tokenizer = Tokenizer.from_file(str(tokenizer_path))
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{tokenizer_path}: not a tokenizer ({error})") from error
        self.tokenizer.encode_special_tokens = True
        config = _read_config(config_path)
        self.context_length: int = _config_int(config, config_path, *CONTEXT_LENGTH_KEYS)
        self.special_tokens = SpecialTokens(
            bos=_config_int(config, config_path, "bos_token_id"),
            eos=_config_int(config, config_path, "eos_token_id"),
            sol=self._special_id(model, SOL),
            eol=self._special_id(model, EOL),
            prior=self._special_id(model, PRIOR),
            post=self._special_id(model, POST),
        )
        self._special_ids = set(astuple(self.special_tokens))

    def __reduce__(self) -> tuple[type["TextCoder"], tuple[Path]]:
        """Another process reads the folder; a tokenizer forgets `encode_special_tokens` there."""
        return TextCoder, (self.model,)

    def _special_id(self, model: Path, text: str) -> int:
        token = self.tokenizer.token_to_id(text)
        if token is None:
            raise UserError(
                f"{model}: its tokenizer lacks the special token {text}; only models that were"
                " trained from the model of the stage 'base' have it"
            )
        return token

    def encode(self, text: str) -> list[int]:
        """The ids of a text; none of them is BOS, EOS or a special token, whatever the text is."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if self._special_ids.isdisjoint(ids):
            return ids
        # The vocabulary has these strings as pieces: split each after its first character.
        matches = re.finditer("|".join(map(re.escape, self._special_strings())), text)
        edges = [0, *(match.start() + 1 for match in matches), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
        encode = self.tokenizer.encode
        return [token for piece in pieces for token in encode(piece, add_special_tokens=False).ids]

    def _special_strings(self) -> Iterator[str]:
        added = self.tokenizer.get_added_tokens_decoder()
        for token in self._special_ids:  # id_to_token may give the string in a normal form
            string = added[token].content if token in added else self.tokenizer.id_to_token(token)
            if string:
                yield string

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, on all cores unless TOKENIZERS_PARALLELISM=false; int32."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        special = list(self._special_ids)
        if not (ids and np.isin(np.concatenate(ids), special).any()):
            return ids
        return [
            np.array(self.encode(text), dtype=np.int32)
            if np.isin(tokens, special).any()
            else tokens
            for text, tokens in zip(texts, ids, strict=True)
        ]

    def decode(self, tokens: list[int]) -> str:
        """The text of ids, special tokens included."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def reproduces(self, text: str, tokens: Sequence[int]) -> bool:
        """Whether the ids decode to the text, without decoding them if that is possible."""
        if self.token_bytes is not None:
            joined = b"".join(map(self.token_bytes.__getitem__, tokens))
            if joined == text.encode():
                return True  # the bytes are valid UTF-8, which every decoder returns as it is
        return self.decode(list(tokens)) == text

    @cached_property
    def token_bytes(self) -> list[bytes] | None:
        """The UTF-8 bytes that each id stands for, where the decoder joins them and does no more:
        those of byte-level tokenizers and of SentencePiece's. None for other decoders."""
        decoder = json.loads(self.tokenizer.to_str())["decoder"] or {}
        steps = decoder.get("decoders", [decoder])
        ids = range(self.tokenizer.get_vocab_size())
        pieces = [self.tokenizer.id_to_token(i) or "" for i in ids]
        types = [step.get("type") for step in steps]
        if types == ["ByteLevel"]:
            return [_byte_level(piece) for piece in pieces]
        if types == ["Replace", "ByteFallback", "Fuse"] and "String" in steps[0]["pattern"]:
            old, new = steps[0]["pattern"]["String"], steps[0]["content"]
            return [_byte_fallback(piece.replace(old, new)) for piece in pieces]
        return None

    def prefix_characters(self, text: str, tokens: int) -> int:
        """How many characters the first `tokens` tokens of `text` cover."""
        offsets = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets[tokens - 1][1] if tokens <= len(offsets) else len(text)


def chunk_token_budget(context_length: int, max_latent_tokens: int) -> int:
    """How many tokens the context window leaves to a chunk and its context, beside BOS, SoL, EoL,
    SoL, Post, a latent of the maximum length and its EoL."""
    return context_length - max_latent_tokens - 6


def _byte_level(piece: str) -> bytes:
    """The bytes of a token of a byte-level tokenizer, which writes each byte as one character."""
    try:
        return bytes(map(_byte_characters().__getitem__, piece))
    except KeyError:  # a token that was added to the vocabulary as plain text
        return piece.encode()


def _byte_fallback(piece: str) -> bytes:
    """The bytes of a token of SentencePiece, which writes bytes of rare characters as <0xE2>."""
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes.fromhex(match[1]) if match else piece.encode()


@cache
def _byte_characters() -> dict[str, int]:
    """GPT-2's character for each byte: itself if it can be seen, else the next one from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = (byte for byte in range(256) if byte not in visible)
    return {chr(byte): byte for byte in visible} | {
        chr(256 + index): byte for index, byte in enumerate(hidden)
    }


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _config_int(config: dict[str, Any], path: Path, *keys: str) -> int:
    """The first of the keys that a model's configuration has; of a list, its first element. Raises
    UserError where that is no integer of 0 or more."""
    value = next((config[key] for key in keys if config.get(key) is not None), None)
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{path}: {' or '.join(keys)} must be an integer, found {value!r}")
    return value
