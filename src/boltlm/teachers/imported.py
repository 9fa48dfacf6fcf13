"""Latents of another data set for the documents of a corpus (`kind: import`)."""

from collections.abc import Iterable, Iterator

from boltlm.corpus.pieces import document_pieces
from boltlm.corpus.reference_latents import chunk_latents
from boltlm.corpus.shuffle import sorted_in_files
from boltlm.corpus.sources import FilesSource, HubSource, read_documents
from boltlm.errors import UserError
from boltlm.progress import track_progress
from boltlm.records import Chunk, Document

# The reasons why the chunks of a document get no latent.
NO_DOCUMENT = "no_document_in_source"
OTHER_TEXT, OTHER_PIECES = "other_text_in_source", "other_pieces_in_source"
UNMATCHED = (NO_DOCUMENT, OTHER_TEXT, OTHER_PIECES)


class ImportedLatents:
    """The latents of `source` for documents with the ids `doc_ids`, which must be asked for in this
    order. The source is read once, until all of them are found; it may have them in any order, for
    which they are sorted in temporary files.
    """

    def __init__(self, key: str, source: FilesSource | HubSource, doc_ids: Iterable[str]) -> None:
        positions = {doc_id: position for position, doc_id in enumerate(doc_ids)}
        wanted = _wanted(key, read_documents(source, 0), set(positions))
        wanted = track_progress(wanted, what=f"{key}: read", total=len(positions), unit="documents")
        self._documents = sorted_in_files(wanted, lambda document: positions[document.doc_id])
        self._next = next(self._documents, None)

    def latents(
        self, document: Document, chunks: list[Chunk]
    ) -> tuple[list[str | None], str | None]:
        """The latent of each chunk of a document, None where the source has none; and the reason
        why the document cannot be matched, or None."""
        imported = self._find(document.doc_id)
        if imported is None:
            return [None] * len(chunks), NO_DOCUMENT
        if imported.text != document.text:
            return [None] * len(chunks), OTHER_TEXT
        if _starts(imported) != _starts(document):
            return [None] * len(chunks), OTHER_PIECES
        return chunk_latents(imported, chunks), None

    def _find(self, doc_id: str) -> Document | None:
        found = self._next
        if found is None or found.doc_id != doc_id:
            return None
        self._next = next(self._documents, None)
        return found


def _starts(document: Document) -> list[int]:
    return [piece.start for piece in document_pieces(document)]


def _wanted(key: str, documents: Iterable[Document], missing: set[str]) -> Iterator[Document]:
    """The documents with the ids `missing`, until each is found. Raises UserError where one comes
    twice."""
    found: set[str] = set()
    for document in documents:
        if document.doc_id in found:
            raise UserError(
                f"{key}.source: two documents have the id '{document.doc_id}'; map another column"
                " to doc_id, or set it to null to number the documents, there and in the corpus"
            )
        if document.doc_id in missing:
            missing.remove(document.doc_id)
            found.add(document.doc_id)
            yield document
            if not missing:
                return
