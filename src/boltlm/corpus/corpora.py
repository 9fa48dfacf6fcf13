"""The corpora of params.yaml as streams of documents.

Corpora that share a source take consecutive documents of it, in the order of params.yaml.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from boltlm.corpus import sources
from boltlm.corpus.sources import CorpusSource
from boltlm.errors import UserError
from boltlm.param_types import Overlay, PositiveInt
from boltlm.records import Document

BASE_CORPUS = "base"  # the stage `base` reads this corpus straight from its source


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusEntry:
    """An entry of `corpora`: a number of documents, and the source that they come from."""

    documents: PositiveInt
    source: Annotated[CorpusSource, Overlay("corpus")]


def corpus_documents(entry: CorpusEntry, seed: int, name: str) -> Iterator[Document]:
    """The first `entry.documents` documents of the source of the corpus `name`.

    Raises UserError where the source has fewer.
    """
    return take_documents(open_source(entry.source, seed), entry.documents, 0, f"corpora.{name}")


def take_documents(
    stream: Iterator[Document], size: int, skipped: int, key: str
) -> Iterator[Document]:
    """The next `size` documents. `skipped`: those that earlier corpora took of this source.
    Raises UserError where the source has fewer."""
    count = 0
    for document in itertools.islice(stream, size):
        count += 1
        yield document
    if count < size:
        raise UserError(
            f"{key}: its source has {skipped + count} documents, too few for {size} after the"
            f" {skipped} that earlier corpora take; lower {key}.documents"
        )


def open_source(source: CorpusSource, seed: int) -> Iterator[Document]:
    """The documents of a source. Raises UserError where it has none at all."""
    is_empty = True
    for document in sources.read_documents(source, seed):
        is_empty = False
        yield document
    if is_empty:
        raise UserError(f"corpus kind '{source.kind}': the source has no document")
