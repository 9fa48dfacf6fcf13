"""Lossless text ↔ token ids, and the ids of the special tokens (docs/method.md, 2.3 and 2.4).

Reads `tokenizer.json` and `config.json` of a model folder with the tokenizers library alone, so
that stages which only need ids start fast.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
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
        strings = filter(None, map(self.tokenizer.id_to_token, self._special_ids))
        matches = re.finditer("|".join(map(re.escape, strings)), text)
        edges = [0, *(match.start() + 1 for match in matches), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
        encode = self.tokenizer.encode
        return [token for piece in pieces for token in encode(piece, add_special_tokens=False).ids]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, on all cores; int32."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        if not np.isin(np.concatenate(ids), list(self._special_ids)).any():
            return ids
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]

    def decode(self, tokens: list[int]) -> str:
        """The text of ids, special tokens included."""
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def prefix_characters(self, text: str, tokens: int) -> int:
        """How many characters the first `tokens` tokens of `text` cover."""
        offsets = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets[tokens - 1][1] if tokens <= len(offsets) else len(text)


def chunk_token_budget(context_length: int, max_latent_tokens: int) -> int:
    """How many tokens the context window leaves to a chunk and its context, beside BOS, SoL, EoL,
    SoL, Post, a latent of the maximum length and its EoL."""
    return context_length - max_latent_tokens - 6


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
