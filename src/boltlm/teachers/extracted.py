"""A plan taken from the text itself (`kind: extract`): key phrases, heading, definition, formula.

It is no thought of a person or of a model, only what stands in the chunk, in another order. It
serves to run the loop on one's own text where there is neither a key nor a model.
"""

import re

from sklearn.feature_extraction.text import TfidfVectorizer

from boltlm.records import Chunk, Document
from boltlm.teachers.response_checks import SupportsEncode

_HEADING = re.compile(r"^[ \t]*(?:#{1,6} +(.+?)[ #]*|([A-Z][^.!?:;\n]{2,60}))$(?=\n|\Z)", re.M)
_DEFINED = re.compile(
    r"\b(?:is|are) (?:called|known as|said to be|defined (?:as|to be)) (?:an? |the )?"
    r"([^.,;:()\n]{3,40})"
)
_FORMULA = re.compile(
    r"\$\$?([^$\n]{1,30}=[^$\n]{1,30})\$|\\\(([^\n]{1,30}?=[^\n]{1,30}?)\\\)"
    r"|(\b\w{1,3}(?:\(\w\))? = [^\s,;]{1,20})"
)
_TERM = r"(?u)\b[^\W\d_][\w-]+\b"  # a word that begins with a letter


class PhraseExtractor:
    """Writes the latent of each chunk of a document from the chunk's own text.

    `phrases`: the most key phrases of a chunk. A phrase is a run of up to three words without
    common English ones; those with the largest tf–idf are taken, with the chunks of the document as
    the documents that idf counts. A latent has at most `max_latent_tokens` tokens.
    """

    def __init__(self, phrases: int, encoder: SupportsEncode, max_latent_tokens: int) -> None:
        self.phrases, self.encoder, self.max_tokens = phrases, encoder, max_latent_tokens

    def latents(self, _: Document, chunks: list[Chunk]) -> tuple[list[str | None], None]:
        """The latent of each chunk, None where nothing can be extracted."""
        terms = self._key_phrases([chunk.text for chunk in chunks])
        return [self._latent(c.text, found) for c, found in zip(chunks, terms, strict=True)], None

    def _latent(self, text: str, terms: list[str]) -> str | None:
        """The parts in the order of their use, as many as there is room for."""
        parts = [f"Terms: {', '.join(terms)}."] if terms else []
        for label, pattern in (("Topic", _HEADING), ("Defines", _DEFINED), ("Formula", _FORMULA)):
            if match := pattern.search(text):
                parts.append(f"{label}: {next(filter(None, match.groups())).strip()}.")
        latent = ""
        for part in parts:
            longer = f"{latent} {part}".strip()
            if len(self.encoder.encode(longer)) <= self.max_tokens:
                latent = longer
        return latent or None

    def _key_phrases(self, texts: list[str]) -> list[list[str]]:
        """The phrases of each text, the most important first; a phrase that is part of one before
        it, or contains it, is left out."""
        vectorizer = TfidfVectorizer(
            ngram_range=(1, 3), stop_words="english", token_pattern=_TERM, sublinear_tf=True
        )
        try:
            matrix = vectorizer.fit_transform(texts).tocsr()
        except ValueError:  # no word in any of them
            return [[] for _ in texts]
        names = vectorizer.get_feature_names_out()
        found: list[list[str]] = []
        for row in range(len(texts)):
            entries = matrix[row]
            scored = sorted(zip(-entries.data, names[entries.indices], strict=True))
            kept: list[str] = []
            for _, phrase in scored:
                if len(kept) < self.phrases and not any(_shares(phrase, old) for old in kept):
                    kept.append(phrase)
            found.append(kept)
        return found


def _shares(one: str, other: str) -> bool:
    """Whether two phrases have a word in common."""
    return bool(set(one.split()) & set(other.split()))
