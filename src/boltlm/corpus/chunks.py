"""The sentences of a text, and the lengths of chunks in sentences (docs/method.md, section 2)."""

import itertools
import math
import re
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from boltlm.errors import UserError
from boltlm.param_types import Distinct, PositiveFloat, PositiveInt

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
