"""Documents that a source lists as pieces of text, each with a latent of its own.

In the data that the authors of the paper released the pieces are the chunks of a document. They are
the chunks here too in the corpora of `chunks.from_source` (docs/data.md); in all others a document
is cut anew, and its sentences inherit the latents of the pieces.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from boltlm.errors import UserError
from boltlm.records import Document


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceColumns:
    """A column that lists the pieces of the text in order, each with its own latent: the name of
    the column, and the fields of an entry that hold its text and its latent. In the data that the
    authors released these are `{column: chunks, text: suffix, latent: latent}`."""

    column: str
    text: str
    latent: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a document, the position of its first character, and its latent."""

    start: int
    text: str
    latent: str | None


def read_pieces(
    row: Mapping[str, Any], text: str | None, columns: PieceColumns, location: str
) -> list[tuple[str, str | None]]:
    """The text and the latent of each piece that a row lists, pieces without text included; an
    empty latent is none.

    Raises UserError where the list is malformed, or where the pieces do not join to `text`, if that
    is given.
    """
    try:
        pairs = [(piece[columns.text], piece[columns.latent]) for piece in row[columns.column]]
    except (KeyError, TypeError) as error:
        raise _malformed(columns, location) from error
    if not all(isinstance(t, str) and isinstance(z, str | None) for t, z in pairs):
        raise _malformed(columns, location)
    if text is not None and "".join(piece for piece, _ in pairs) != text:
        raise UserError(
            f"{location}: the pieces in column '{columns.column}' do not join to the text; set"
            " columns.text to null to take the pieces as the text"
        )
    return [(piece, latent or None) for piece, latent in pairs]


def _malformed(columns: PieceColumns, location: str) -> UserError:
    return UserError(
        f"{location}: column '{columns.column}' does not list pieces with the text fields"
        f" '{columns.text}' and '{columns.latent}'"
    )


def document_pieces(document: Document) -> list[Piece]:
    """The pieces of a document that have a text; an empty one cannot be a chunk."""
    assert document.pieces is not None
    assert document.thoughts is not None
    starts = itertools.accumulate(document.pieces, initial=0)
    spans = zip(starts, document.pieces, document.thoughts, strict=False)
    return [
        Piece(start, document.text[start : start + length], thought)
        for start, length, thought in spans
        if length
    ]
