"""Reference latents: the latents that a data set itself carries for its documents, their pieces or
their sentences.

The teacher of kind `dataset` hands them out as training latents, and the latents that a model
writes are compared with them (the metrics `exact_match`).
"""

import bisect
import itertools
from dataclasses import replace
from pathlib import Path

from boltlm.corpus.chunks import split_sentences
from boltlm.corpus.pieces import document_pieces
from boltlm.errors import UserError
from boltlm.records import Chunk, Document, read_shard, shard_paths

NO_LATENT = "no_latent_in_data"


def chunk_latents(document: Document, chunks: list[Chunk]) -> list[str | None]:
    """The reference latent of each chunk of a document, None where the data have none for it.

    If the document has pieces, a chunk that begins where a piece begins gets that piece's latent;
    the other parts of a piece that was cut have none. If it has a thought for each sentence, a
    chunk gets the thoughts of the sentences that it overlaps; a thought that consecutive sentences
    share appears once, and where none of them needs a thought the latent is empty. If it has a
    single latent, the last chunk gets it, because that is where the document concludes.
    Raises UserError where the document has neither, or where the numbers of thoughts and sentences
    differ.
    """
    if document.pieces is not None:
        by_start = {piece.start: piece.latent for piece in document_pieces(document)}
        starts = itertools.accumulate((len(chunk.text) for chunk in chunks[:-1]), initial=0)
        return [by_start.get(start) for start in starts]
    if document.thoughts is not None:
        return _sentence_latents(document, chunks)
    if document.latent is None:
        raise UserError(
            f"document '{document.doc_id}' has no latent; the teacher kind 'dataset' needs a"
            " source with latents (set columns.latent or columns.pieces in params.yaml)"
        )
    return [*([None] * (len(chunks) - 1)), document.latent or None]


def by_sentences(document: Document) -> Document:
    """The document with a thought for each sentence in place of its pieces: the latent of the piece
    that holds the sentence's first character that is not white space. A document without pieces is
    returned as it is."""
    if document.pieces is None:
        return document
    pieces = document_pieces(document)
    starts = [piece.start for piece in pieces]
    thoughts: list[str | None] = []
    start = 0
    for sentence in split_sentences(document.text):
        first = start + len(sentence) - len(sentence.lstrip())
        index = bisect.bisect_right(starts, min(first, len(document.text) - 1)) - 1
        thoughts.append(pieces[index].latent)
        start += len(sentence)
    return replace(document, thoughts=tuple(thoughts), pieces=None)


def document_thought(document: Document) -> str | None:
    """The thought for a document's conclusion, its last sentence; None where it has none."""
    return document.thoughts[-1] if document.thoughts else document.latent


def reference_latents(split: Path, chunks: Path) -> dict[tuple[str, int], str]:
    """The reference latents of a corpus by (doc_id, chunk); chunks that have none, or an empty one,
    are absent.

    `split` and `chunks`: the folders of the corpus's documents and chunks.
    """
    latents: dict[tuple[str, int], str] = {}
    for path in shard_paths(chunks):
        latents |= shard_reference_latents(split / path.name, path)
    return latents


def shard_reference_latents(documents: Path, chunks: Path) -> dict[tuple[str, int], str]:
    """`reference_latents` of a single shard, from its file of documents and its file of chunks."""
    by_id = {document.doc_id: document for document in read_shard(documents, Document)}
    latents: dict[tuple[str, int], str] = {}
    groups = itertools.groupby(read_shard(chunks, Chunk), lambda chunk: chunk.doc_id)
    for doc_id, group in groups:
        document = by_id[doc_id]
        if document.thoughts is None and document.latent is None:
            continue
        document_chunks = list(group)
        pairs = zip(document_chunks, chunk_latents(document, document_chunks), strict=True)
        latents |= {(doc_id, chunk.chunk): latent for chunk, latent in pairs if latent}
    return latents


def _sentence_latents(document: Document, chunks: list[Chunk]) -> list[str | None]:
    assert document.thoughts is not None
    sentences = split_sentences(document.text)
    if len(sentences) != len(document.thoughts):
        raise UserError(
            f"document '{document.doc_id}' has {len(sentences)} sentences but"
            f" {len(document.thoughts)} thoughts"
        )
    ends = list(itertools.accumulate(map(len, sentences)))
    latents: list[str | None] = []
    start = 0
    for chunk in chunks:
        stop = start + len(chunk.text)
        thoughts = [
            thought
            for thought, sentence, end in zip(document.thoughts, sentences, ends, strict=True)
            if thought is not None and end > start and end - len(sentence) < stop
        ]
        distinct = (thought for thought, _ in itertools.groupby(thoughts) if thought)
        latents.append(" ".join(distinct) if thoughts else None)
        start = stop
    return latents
