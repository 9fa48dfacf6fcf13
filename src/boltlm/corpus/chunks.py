"""Documents become chunks of whole sentences, tokenised once, alone, and without loss.

Invariants (SPEC section 2): joining a document's sentences, or its chunks, gives its text back
byte for byte; so does decoding the ids of all its chunks, joined.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from boltlm.errors import UserError
from boltlm.records import Chunk, Document
from boltlm.seeds import generator

# A sentence ends behind . ! ? or … and closing marks where white space follows, or before a blank
# line; not behind an initial or one of these abbreviations.
_ABBREVIATIONS = (
    "e.g|i.e|cf|vs|etc|al|Fig|Figs|Eq|Eqs|Sec|Ch|No|Dr|Mr|Mrs|Ms|Prof|St|Thm|Def|approx|resp"
)
_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|(?=\n[ \t]*\n)")
_NO_END = re.compile(rf"(?:^|[\s(])(?:{_ABBREVIATIONS}|[A-Z])\.$")
_LOOK_BACK = 16  # characters; more than the longest abbreviation takes


class LossyTextError(UserError):
    """The tokenizer cannot give this document's text back."""


class Encoder(Protocol):
    """What chunking needs of a tokenizer: `boltlm.tokens.TextCoder` is one."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...
    def prefix_characters(self, text: str, tokens: int) -> int:
        """How many characters the first `tokens` tokens of `text` cover."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunking:
    """Params section `chunks`: lengths in sentences, Poisson(mean) truncated to [least, most]."""

    mean_sentences: float
    least_sentences: int
    most_sentences: int

    def __post_init__(self) -> None:
        if self.mean_sentences <= 0 or not 1 <= self.least_sentences <= self.most_sentences:
            raise UserError("mean_sentences > 0 and 1 ≤ least_sentences ≤ most_sentences")


def encodable(text: str) -> bool:
    """Whether the text is Unicode: JSON can hold half a surrogate pair, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def sentences(text: str) -> list[str]:
    """Cut `text` into sentences; white space goes with the sentence behind it, as a word's space
    goes with the word in most tokenizers.

    `"".join(sentences(text)) == text` for every text; a blank text is one sentence, an empty
    one none; white space at the very end stays with the last sentence.
    """
    edges = [0]
    for match in _END.finditer(text):
        end = match.end()
        if match[0]:
            ends = not _NO_END.search(text[max(edges[-1], end - _LOOK_BACK) : end])
        else:
            ends = bool(text[edges[-1] : end].strip())
        if ends:
            edges.append(end)
    if len(edges) > 1 and not text[edges[-1] :].strip():
        edges.pop()
    return [text[start:end] for start, end in itertools.pairwise([*edges, len(text)]) if text]


def length_law(config: Chunking) -> np.ndarray:
    """Probabilities of least … most sentences: Poisson redrawn until it falls into the range."""
    counts = range(config.least_sentences, config.most_sentences + 1)
    logs = np.array([n * math.log(config.mean_sentences) - math.lgamma(n + 1) for n in counts])
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


def chunk_sentences(count: int, config: Chunking, draw: np.random.Generator) -> list[int]:
    """Lengths, in sentences, of the chunks of a document of `count` sentences; the last chunk
    takes what is left."""
    law = length_law(config)
    lengths: list[int] = []
    left = count
    while left > 0:
        drawn = int(draw.choice(len(law), p=law)) + config.least_sentences
        lengths.append(min(drawn, left))
        left -= lengths[-1]
    return lengths


class Chunker:
    """Cuts documents; `most_tokens` is what the model's window leaves to one chunk.

    `cut_chunks` counts the chunks that had to be cut because they were longer.
    """

    def __init__(self, config: Chunking, encoder: Encoder, most_tokens: int, seed: int) -> None:
        if most_tokens < 1:
            raise UserError(
                f"the model's window leaves {most_tokens} tokens to a chunk; lower"
                " max_latent_tokens or take a model with a longer window"
            )
        self.config, self.encoder = config, encoder
        self.most_tokens, self.seed = most_tokens, seed
        self.cut_chunks = 0

    def chunks(self, document: Document) -> list[Chunk]:
        """The document's chunks. Raises LossyTextError where the tokenizer loses some of it."""
        if not encodable(document.text):
            raise LossyTextError(f"document '{document.doc_id}': half a surrogate pair in its text")
        draw = generator(self.seed, "chunks", document.doc_id)
        pieces = sentences(document.text)
        made: list[Chunk] = []
        start = 0
        for length in chunk_sentences(len(pieces), self.config, draw):
            for text in self._fitting(pieces[start : start + length]):
                tokens = tuple(self.encoder.encode(text))
                if self.encoder.decode(list(tokens)) != text:
                    raise LossyTextError(f"document '{document.doc_id}': the tokenizer loses text")
                made.append(
                    Chunk(doc_id=document.doc_id, chunk=len(made), text=text, tokens=tokens)
                )
            start += length
        return made

    def _fitting(self, run: list[str]) -> Iterator[str]:
        """The run as one text, or as several that each fit the window."""
        text = "".join(run)
        if len(self.encoder.encode(text)) <= self.most_tokens:
            yield text
            return
        self.cut_chunks += 1
        held = ""
        for sentence in run:
            if held and len(self.encoder.encode(held + sentence)) > self.most_tokens:
                yield held
                held = ""
            held += sentence
            while len(self.encoder.encode(held)) > self.most_tokens:
                piece = self._prefix(held)
                yield piece
                held = held[len(piece) :]
        if held:
            yield held

    def _prefix(self, text: str) -> str:
        """A beginning that fits when encoded alone: at a token's edge where that is enough, else
        at the character that the count of its tokens suggests."""
        size = min(self.encoder.prefix_characters(text, self.most_tokens), len(text) - 1)
        while size > 0:
            tokens = len(self.encoder.encode(text[:size]))
            if tokens <= self.most_tokens:
                return text[:size]
            size = min(size - 1, size * self.most_tokens // tokens + 1)
        raise UserError(
            f"a single character needs more than the {self.most_tokens} tokens left to a chunk"
        )
