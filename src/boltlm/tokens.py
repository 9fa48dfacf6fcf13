"""Text ↔ token ids without loss, and the ids of the special tokens (SPEC section 2).

Reads `tokenizer.json` and `config.json` of a model folder with the tokenizers library alone, so
stages that only need ids start fast.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from boltlm.errors import UserError

SOL, EOL, PRIOR, POST = "<|latent|>", "<|/latent|>", "<|prior|>", "<|posterior|>"
MARKERS = (SOL, EOL, PRIOR, POST)


@dataclass(frozen=True, kw_only=True, slots=True)
class Markers:
    """Token ids: begin and end of a document, start and end of a latent, the two modes."""

    bos: int
    eos: int
    sol: int
    eol: int
    prior: int
    post: int

    @property
    def forbidden(self) -> tuple[int, ...]:
        """What a latent must not hold inside."""
        return (self.bos, self.sol, self.prior, self.post)


class TextCoder:
    """A model folder's tokenizer. Every text is encoded alone, with no token added to it, and
    text that looks like a special token is still text."""

    def __init__(self, model: Path) -> None:
        file, config_file = model / "tokenizer.json", model / "config.json"
        for path in (file, config_file):
            if not path.is_file():
                raise UserError(f"{path}: no such file; run the stage 'base' (dvc repro base)")
        self.tokenizer = Tokenizer.from_file(str(file))
        self.tokenizer.encode_special_tokens = True
        config = json.loads(config_file.read_text(encoding="utf-8"))
        self.window: int = config["max_position_embeddings"]
        self.markers = Markers(
            bos=config["bos_token_id"],
            eos=_first(config["eos_token_id"]),
            sol=self._marker(model, SOL),
            eol=self._marker(model, EOL),
            prior=self._marker(model, PRIOR),
            post=self._marker(model, POST),
        )
        self._special = set(astuple(self.markers))

    def _marker(self, model: Path, text: str) -> int:
        found = self.tokenizer.token_to_id(text)
        if found is None:
            raise UserError(
                f"{model}: its tokenizer lacks the special token {text}; only models that descend"
                " from the stage 'base' have it"
            )
        return found

    def encode(self, text: str) -> list[int]:
        """The ids of a text; none of them is BOS, EOS or a marker, whatever the text says."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if self._special.isdisjoint(ids):
            return ids
        # A vocabulary that holds these strings as pieces: cut each behind its first character.
        names = filter(None, map(self.tokenizer.id_to_token, self._special))
        found = re.finditer("|".join(map(re.escape, names)), text)
        edges = [0, *(match.start() + 1 for match in found), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
        encode = self.tokenizer.encode
        return [token for piece in pieces for token in encode(piece, add_special_tokens=False).ids]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, on all cores; int32."""
        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        found = [np.array(one.ids, dtype=np.int32) for one in encoded]
        if not np.isin(np.concatenate(found), list(self._special)).any():
            return found
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def prefix_characters(self, text: str, tokens: int) -> int:
        offsets = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets[tokens - 1][1] if tokens <= len(offsets) else len(text)


def most_chunk_tokens(window: int, max_latent_tokens: int) -> int:
    """What the window leaves to a chunk beside BOS, SoL, EoL, SoL, Post, a latent and its EoL."""
    return window - max_latent_tokens - 6


def _first(value: int | list[int]) -> int:
    return value[0] if isinstance(value, list) else value
