"""Documents are cut into chunks, of whole sentences or as their source cuts them; each chunk is
tokenised alone, without loss.

Joining the chunks of a document gives its text back exactly; so does decoding the token ids of all
its chunks, joined (docs/method.md, section 2). Most chunks are encoded once. One that is too long
is cut where its token ids say that the limit lies, and its parts are encoded together with those of
other documents; only where that cannot be known is it cut by trial.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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

# By how many tokens the number for a text may differ from the sum for its parts, at most: the
# tokens at the edges are others. A difference that is larger needs no encoding to be certain.
_EDGE_TOKENS = 16
_EncodedTexts = list[tuple[str, np.ndarray]]


class _Part(NamedTuple):
    """Sentences that are expected to fit, the next sentence (empty: there is none), and the
    expected number of tokens with it."""

    text: str
    following: str
    with_following: int


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
        cuts = [self._predict_cuts(runs[i], encoded[i][0][1]) for i in long]
        part_ids = iter(self._encode([part.text for parts in cuts for part in parts]))
        for i, parts in zip(long, cuts, strict=True):
            ids = list(itertools.islice(part_ids, len(parts)))
            texts = [part.text for part in parts]
            if not (parts and self._are_right(parts, ids)):
                texts = list(self._cut_by_trial(runs[i]))
                ids = self._encode(texts)
            encoded[i] = list(zip(texts, ids, strict=True))
        return encoded

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [ids for batch in text_batches(texts) for ids in self.encoder.encode_batch(batch)]

    def _predict_cuts(self, sentences: Sequence[str], ids: np.ndarray) -> list[_Part]:
        """The sentences, which are encoded as `ids`, in parts of as many as are expected to fit;
        none where one does not fit, or where it is not known what text each id stands for."""
        token_bytes = self.encoder.token_bytes
        if token_bytes is None:
            return []
        ends = np.cumsum([len(token_bytes[token]) for token in ids.tolist()])
        sentence_ends = np.cumsum([len(sentence.encode()) for sentence in sentences])
        counts = np.searchsorted(ends, sentence_ends, side="right").tolist()
        parts: list[_Part] = []
        start = used = 0
        while start < len(sentences):
            stop = bisect_right(counts, used + self.max_chunk_tokens)
            if stop <= start:
                return []
            following = sentences[stop : stop + 1]
            with_following = counts[stop] - used if following else 0
            parts.append(_Part("".join(sentences[start:stop]), "".join(following), with_following))
            start, used = stop, counts[stop - 1]
        return parts

    def _are_right(self, parts: Sequence[_Part], ids: Sequence[np.ndarray]) -> bool:
        """Whether every part fits and, but for the last, has no room for the next sentence."""
        limit = self.max_chunk_tokens
        return all(len(part_ids) <= limit for part_ids in ids) and all(
            part.with_following > limit + _EDGE_TOKENS
            or len(self.encoder.encode(part.text + part.following)) > limit
            for part in parts[:-1]
        )

    def _cut_by_trial(self, sentences: Sequence[str]) -> Iterator[str]:
        """The sentences as several texts that fit, by encoding each in turn. A sentence is cut only
        if it is too long by itself."""
        pending = ""
        for sentence in sentences:
            if pending and len(self.encoder.encode(pending + sentence)) > self.max_chunk_tokens:
                yield pending
                pending = ""
            pending += sentence
            while len(self.encoder.encode(pending)) > self.max_chunk_tokens:
                prefix = self._fitting_prefix(pending)
                yield prefix
                pending = pending[len(prefix) :]
        if pending:
            yield pending

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
