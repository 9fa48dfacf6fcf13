"""The teacher that asks nobody: latents that the source data carries."""

import itertools
from pathlib import Path

from boltlm.corpus.chunks import sentences
from boltlm.errors import UserError
from boltlm.records import Chunk, Document, read_shard, shards

NO_LATENT = "no_latent_in_data"


def chunk_latents(document: Document, chunks: list[Chunk]) -> list[str | None]:
    """The latent of each chunk of a document, None where the data has none for it.

    Thoughts by sentence: a chunk gets those of its sentences, a thought that several in a row
    share once. One
    latent for the document: it belongs to the last chunk, where the document concludes.
    Raises UserError when the document carries neither, or not one thought a sentence.
    """
    if document.thoughts is not None:
        return _from_sentences(document, chunks)
    if document.latent is None:
        raise UserError(
            f"document '{document.doc_id}' carries no latent; teacher kind 'dataset' needs a"
            " source with thoughts (columns.latent in params.yaml)"
        )
    return [*([None] * (len(chunks) - 1)), document.latent or None]


def document_thought(document: Document) -> str | None:
    """The thought behind a document's conclusion, its last sentence; None where it carries none."""
    return document.thoughts[-1] if document.thoughts else document.latent


def _from_sentences(document: Document, chunks: list[Chunk]) -> list[str | None]:
    assert document.thoughts is not None
    pieces = sentences(document.text)
    if len(pieces) != len(document.thoughts):
        raise UserError(
            f"document '{document.doc_id}' has {len(pieces)} sentences but"
            f" {len(document.thoughts)} thoughts"
        )
    ends = list(itertools.accumulate(map(len, pieces)))
    latents: list[str | None] = []
    start = 0
    for chunk in chunks:
        stop = start + len(chunk.text)
        thoughts = (
            thought
            for thought, piece, end in zip(document.thoughts, pieces, ends, strict=True)
            if thought and end > start and end - len(piece) < stop
        )
        latents.append(" ".join(thought for thought, _ in itertools.groupby(thoughts)) or None)
        start = stop
    return latents


def references(split: Path, chunks: Path) -> dict[tuple[str, int], str]:
    """The data's own latent for each chunk of a corpus that has one, by (doc_id, chunk); empty
    where the data carries none. What a model writes is compared with it, never trained on it."""
    found: dict[tuple[str, int], str] = {}
    for path in shards(chunks):
        found |= shard_references(split / path.name, path)
    return found


def shard_references(documents: Path, chunks: Path) -> dict[tuple[str, int], str]:
    """`references` of one shard, by its two files."""
    by_id = {document.doc_id: document for document in read_shard(documents, Document)}
    found: dict[tuple[str, int], str] = {}
    of_document = itertools.groupby(read_shard(chunks, Chunk), lambda chunk: chunk.doc_id)
    for doc_id, group in of_document:
        document = by_id[doc_id]
        if document.thoughts is None and document.latent is None:
            continue
        cut = list(group)
        for chunk, latent in zip(cut, chunk_latents(document, cut), strict=True):
            if latent is not None:
                found[doc_id, chunk.chunk] = latent
    return found
