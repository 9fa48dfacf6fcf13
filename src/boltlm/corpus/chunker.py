"""Documents are cut into chunks, of whole sentences or as their source cuts them; each chunk is
tokenised alone, without loss.

Joining the chunks of a document gives its text back exactly; so does decoding the token ids of all
its chunks, joined (docs/method.md, section 2). Most chunks are encoded once. Where one that is too
long must be cut follows from its ids, except close to the limit, where the text is encoded to know.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from boltlm.corpus.chunks import (
    ChunkingConfig,
    is_encodable,
    sample_chunk_lengths,
    split_sentences,
)
from boltlm.corpus.contamination import text_batches
from boltlm.corpus.pieces import document_pieces
from boltlm.errors import UserError
from boltlm.records import Chunk, Document
from boltlm.seeds import generator
from boltlm.tokens import TextCoder

# By how many tokens the number for a text may differ from that in a longer text, at most: the
# tokens at its edges may be others.
_EDGE_TOKENS = 16
_EncodedTexts = list[tuple[str, np.ndarray]]


class Chunker:
    """Cuts documents into chunks of at most `max_chunk_tokens` tokens.

    `cut_chunks` counts the runs of sentences, or the pieces, of documents that the tokenizer can
    reproduce, that were longer and had to be cut into several chunks. Raises UserError if
    `max_chunk_tokens` is less than 1.
    """

    def __init__(
        self, config: ChunkingConfig, encoder: TextCoder, max_chunk_tokens: int, seed: int
    ) -> None:
        if max_chunk_tokens < 1:
            raise UserError(
                f"the model's context length leaves {max_chunk_tokens} tokens to a chunk; lower"
                " max_latent_tokens or use a model with a longer context"
            )
        self.config, self.encoder = config, encoder
        self.max_chunk_tokens, self.seed = max_chunk_tokens, seed
        self.cut_chunks = 0

    def chunks(self, documents: Sequence[Document]) -> list[list[Chunk] | None]:
        """The chunks of each document in reading order: its pieces, if it has them, or else runs of
        its sentences. They depend on the seed and on this document alone. None where the tokenizer
        cannot reproduce the text, or the text has an unpaired surrogate."""
        runs: list[list[str]] = []
        lengths: list[int] = []  # of the part of `runs` that belongs to each document
        for document in documents:
            count = len(runs)
            if is_encodable(document.text):
                runs += self._runs(document)
            lengths.append(len(runs) - count)
        encoded = iter(self._fitting(runs))
        chunked: list[list[Chunk] | None] = []
        for document, length in zip(documents, lengths, strict=True):
            own = list(itertools.islice(encoded, length))
            chunked.append(self._document_chunks(document, own) if own else None)
        return chunked

    def _document_chunks(
        self, document: Document, runs: Sequence[_EncodedTexts]
    ) -> list[Chunk] | None:
        """One chunk for each text; None where the ids of one do not decode to it."""
        chunks: list[Chunk] = []
        for text, ids in itertools.chain.from_iterable(runs):
            tokens = tuple(ids.tolist())
            if not self.encoder.reproduces(text, tokens):
                return None
            number = len(chunks)
            chunks.append(Chunk(doc_id=document.doc_id, chunk=number, text=text, tokens=tokens))
        self.cut_chunks += sum(len(run) > 1 for run in runs)
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

    def _fitting(self, runs: Sequence[Sequence[str]]) -> list[_EncodedTexts]:
        """Each run of sentences as one text with its ids if that is short enough, otherwise as
        several."""
        texts = ["".join(run) for run in runs]
        encoded = [[pair] for pair in zip(texts, self._encode(texts), strict=True)]
        long = [i for i, ((_, ids),) in enumerate(encoded) if len(ids) > self.max_chunk_tokens]
        cuts = [list(self._cut(runs[i], self._expected(runs[i], encoded[i][0][1]))) for i in long]
        part_ids = iter(self._encode([text for texts in cuts for text in texts]))
        for i, texts in zip(long, cuts, strict=True):
            ids = list(itertools.islice(part_ids, len(texts)))
            if max(map(len, ids)) > self.max_chunk_tokens:  # something was not as expected
                texts = list(self._cut(runs[i], [None] * len(runs[i])))
                ids = self._encode(texts)
            encoded[i] = list(zip(texts, ids, strict=True))
        return encoded

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [ids for batch in text_batches(texts) for ids in self.encoder.encode_batch(batch)]

    def _expected(self, sentences: Sequence[str], ids: np.ndarray) -> list[int | None]:
        """How many of the ids belong to each of the sentences, which were encoded together; None
        where it is not known what text each id stands for."""
        token_bytes = self.encoder.token_bytes
        if token_bytes is None:
            return [None] * len(sentences)
        ends = np.cumsum([len(token_bytes[token]) for token in ids.tolist()])
        sentence_ends = np.cumsum([len(sentence.encode()) for sentence in sentences])
        return np.diff(np.searchsorted(ends, sentence_ends, side="right"), prepend=0).tolist()

    def _exceeds(self, text: str, expected: int | None) -> bool:
        """Whether a text is too long; it is encoded only if the expected number of tokens, where
        there is one, leaves that open."""
        limit = self.max_chunk_tokens
        if expected is None or abs(expected - limit) <= _EDGE_TOKENS:
            expected = len(self.encoder.encode(text))
        return expected > limit

    def _cut(self, sentences: Sequence[str], counts: Sequence[int | None]) -> Iterator[str]:
        """The sentences as texts of as many as fit. A sentence is cut only if it is too long by
        itself. `counts`: the expected numbers of tokens, if known."""
        pending, size = "", 0
        for sentence, count in zip(sentences, counts, strict=True):
            total = None if count is None else size + count
            if pending and self._exceeds(pending + sentence, total):
                yield pending
                pending, total = "", count
            pending, size = pending + sentence, total or 0
            if self._exceeds(pending, total):
                *parts, pending = self._cut_sentence(pending)
                yield from parts
                size = len(self.encoder.encode(pending))
        if pending:
            yield pending

    def _cut_sentence(self, text: str) -> list[str]:
        """A text in parts that fit, each as long as possible."""
        parts: list[str] = []
        start = 0
        while True:
            window, is_too_long = self._window(text, start)
            if not is_too_long:
                return [*parts, window]
            parts.append(self._fitting_prefix(window))
            start += len(parts[-1])

    def _window(self, text: str, start: int) -> tuple[str, bool]:
        """The text from `start` on, or as much of it as certainly has more than `max_chunk_tokens`
        tokens, and whether it has more: the time for a cut does not grow with the document."""
        size = self.max_chunk_tokens + _EDGE_TOKENS
        while True:
            window = text[start : start + size]
            tokens = len(self.encoder.encode(window))
            if start + size >= len(text):
                return window, tokens > self.max_chunk_tokens
            if tokens > self.max_chunk_tokens + _EDGE_TOKENS:
                return window, True
            size *= 2

    def _fitting_prefix(self, text: str) -> str:
        """A prefix that is short enough when it is encoded alone. It ends where a token of `text`
        ends if possible, otherwise where the ratio of tokens to characters suggests."""
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
