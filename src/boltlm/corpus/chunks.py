"""Documents are cut into chunks, of whole sentences or as their source cuts them; each chunk is
tokenised alone, without loss.

Joining the sentences of a document, or its chunks, gives its text back exactly; so does decoding
the token ids of all its chunks, joined (docs/method.md, section 2).
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Protocol

import numpy as np

from boltlm.corpus.pieces import document_pieces
from boltlm.errors import UserError
from boltlm.param_types import Distinct, PositiveFloat, PositiveInt
from boltlm.records import Chunk, Document
from boltlm.seeds import generator

# A sentence ends after . ! ? or … and closing marks if white space follows, after 。 ！ ？ or ｡ and
# closing marks, and before a blank line, but not after an initial or one of these abbreviations.
_ABBREVIATIONS = (
    "e.g|i.e|cf|vs|etc|al|Fig|Figs|Eq|Eqs|Sec|Ch|No|Dr|Mr|Mrs|Ms|Prof|St|Thm|Def|approx|resp"
)
# Every run of marks is read once (possessive quantifiers, a start only where a run starts), so the
# time is linear in the length of any text.
_END = re.compile(
    r"(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s)|[。！？｡]++[\"'”’)\]」』）】》]*+|(?=\n[ \t]*+\n)"
)
_NON_SPACE = re.compile(r"\S")
_NO_END = re.compile(rf"(?:^|[\s(])(?:{_ABBREVIATIONS}|[A-Z])\.$")
_LOOK_BACK = 16  # characters, more than the longest abbreviation has


class LossyTextError(UserError):
    """The tokenizer cannot reproduce the text of a document."""


class ChunkEncoder(Protocol):
    """What chunking needs of a tokenizer; `boltlm.tokens.TextCoder` implements it."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...
    def prefix_characters(self, text: str, tokens: int) -> int:
        """How many characters the first `tokens` tokens of `text` cover."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkingConfig:
    """Chunk lengths in sentences: Poisson(mean_sentences) truncated to [min_sentences,
    max_sentences]. `from_source`: the corpora whose chunks are the pieces that their source lists
    (`columns.pieces`), whatever the lengths."""

    mean_sentences: PositiveFloat
    min_sentences: PositiveInt
    max_sentences: PositiveInt
    from_source: Annotated[tuple[str, ...], Distinct()]

    def __post_init__(self) -> None:
        if self.min_sentences > self.max_sentences:
            raise UserError(
                f"min_sentences must be at most max_sentences ({self.max_sentences}), found"
                f" {self.min_sentences}"
            )


def is_encodable(text: str) -> bool:
    """Whether the text has a UTF-8 encoding; unpaired surrogates, which JSON allows, have none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def split_sentences(text: str) -> list[str]:
    """Split `text` into sentences (docs/method.md, 2.1).

    White space between two sentences belongs to the second, as the space before a word belongs to
    the word in most tokenizers. White space at the end of the text belongs to the last sentence.
    `"".join(split_sentences(text)) == text` for every text; a text of white space is one sentence,
    the empty text has none.
    """
    edges, words = [0], _next_word(text, 0)
    for match in _END.finditer(text):
        end = match.end()
        if match[0]:
            ends = not _NO_END.search(text[max(edges[-1], end - _LOOK_BACK) : end])
        else:
            ends = words < end
        if ends:
            edges.append(end)
            words = _next_word(text, end)
    if len(edges) > 1 and not text[edges[-1] :].strip():
        edges.pop()
    return [text[start:end] for start, end in itertools.pairwise([*edges, len(text)]) if text]


def _next_word(text: str, start: int) -> int:
    """Where the white space from `start` on ends, at the latest at the end of the text."""
    match = _NON_SPACE.search(text, start)
    return match.start() if match else len(text)


def chunk_length_distribution(config: ChunkingConfig) -> np.ndarray:
    """Probabilities of the lengths min_sentences … max_sentences under the truncated Poisson
    distribution (docs/method.md, 2.2)."""
    counts = range(config.min_sentences, config.max_sentences + 1)
    logs = np.array([n * math.log(config.mean_sentences) - math.lgamma(n + 1) for n in counts])
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


def sample_chunk_lengths(count: int, config: ChunkingConfig, rng: np.random.Generator) -> list[int]:
    """Lengths, in sentences, of the chunks of a document of `count` sentences. They sum to `count`,
    for which the last one is shortened (docs/method.md, 2.2)."""
    probabilities = chunk_length_distribution(config)
    lengths: list[int] = []
    remaining = count
    while remaining > 0:
        length = int(rng.choice(len(probabilities), p=probabilities)) + config.min_sentences
        lengths.append(min(length, remaining))
        remaining -= lengths[-1]
    return lengths


class Chunker:
    """Cuts documents into chunks of at most `max_chunk_tokens` tokens.

    `cut_chunks` counts the runs of sentences, or the pieces, that were longer and had to be cut
    into several chunks. Raises UserError if `max_chunk_tokens` is less than 1.
    """

    def __init__(
        self, config: ChunkingConfig, encoder: ChunkEncoder, max_chunk_tokens: int, seed: int
    ) -> None:
        if max_chunk_tokens < 1:
            raise UserError(
                f"the model's context length leaves {max_chunk_tokens} tokens to a chunk; lower"
                " max_latent_tokens or use a model with a longer context"
            )
        self.config, self.encoder = config, encoder
        self.max_chunk_tokens, self.seed = max_chunk_tokens, seed
        self.cut_chunks = 0

    def chunks(self, document: Document) -> list[Chunk]:
        """The document's chunks in reading order: its pieces, if it has them, or else runs of its
        sentences. They depend on the seed and on this document alone. Raises LossyTextError where
        the tokenizer cannot reproduce the text."""
        if not is_encodable(document.text):
            raise LossyTextError(f"document '{document.doc_id}': unpaired surrogate in its text")
        chunks: list[Chunk] = []
        for sentences in self._runs(document):
            for text in self._cut_to_fit(sentences):
                tokens = tuple(self.encoder.encode(text))
                if self.encoder.decode(list(tokens)) != text:
                    raise LossyTextError(
                        f"document '{document.doc_id}': the tokenizer does not reproduce its text"
                    )
                chunks.append(
                    Chunk(doc_id=document.doc_id, chunk=len(chunks), text=text, tokens=tokens)
                )
        return chunks

    def _runs(self, document: Document) -> Iterator[list[str]]:
        """The sentences of each chunk, before those that are too long are cut."""
        if document.pieces is not None:
            for piece in document_pieces(document):
                yield split_sentences(piece.text)
            return
        rng = generator(self.seed, "chunks", document.doc_id)
        sentences = split_sentences(document.text)
        start = 0
        for length in sample_chunk_lengths(len(sentences), self.config, rng):
            yield sentences[start : start + length]
            start += length

    def _cut_to_fit(self, sentences: list[str]) -> Iterator[str]:
        """The sentences as one text if that is short enough, otherwise as several. A sentence is
        cut only if it is too long by itself."""
        text = "".join(sentences)
        if not self._window(text)[1]:
            yield text
            return
        self.cut_chunks += 1
        pending = ""
        for sentence in sentences:
            if pending and self._window(pending + sentence)[1]:
                yield pending
                pending = ""
            pending += sentence
            start = 0  # of what is left of a long sentence
            while prefix := self._fitting_prefix(pending, start):
                yield prefix
                start += len(prefix)
            pending = pending[start:]
        if pending:
            yield pending

    def _window(self, text: str, start: int = 0) -> tuple[str, bool]:
        """The text from `start` on, or as much of it as certainly has more than `max_chunk_tokens`
        tokens, and whether it has more: the time for a cut does not grow with the document."""
        size = self.max_chunk_tokens + _LOOK_BACK
        while True:
            window = text[start : start + size]
            tokens = len(self.encoder.encode(window))
            if start + size >= len(text):
                return window, tokens > self.max_chunk_tokens
            if tokens > self.max_chunk_tokens + _LOOK_BACK:
                return window, True
            size *= 2

    def _fitting_prefix(self, text: str, start: int) -> str:
        """A prefix of the text from `start` on that is short enough when it is encoded alone; empty
        where the text itself is. It ends where a token ends if possible, otherwise where the ratio
        of tokens to characters suggests."""
        text, is_too_long = self._window(text, start)
        if not is_too_long:
            return ""
        size = min(self.encoder.prefix_characters(text, self.max_chunk_tokens), len(text) - 1)
        while size > 0:
            tokens = len(self.encoder.encode(text[:size]))
            if tokens <= self.max_chunk_tokens:
                return text[:size]
            size = min(size - 1, size * self.max_chunk_tokens // tokens + 1)
        raise UserError(
            f"a single character takes more than the {self.max_chunk_tokens} tokens that the"
            " context length leaves to a chunk; lower max_latent_tokens or use a model with a"
            " longer context"
        )
