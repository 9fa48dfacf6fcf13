"""Documents from plain text and Markdown files: one for each file or for each heading."""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from boltlm.errors import UserError
from boltlm.param_types import NonNegativeInt, PositiveInt
from boltlm.records import Document

TEXT_FILE_TYPES = (".txt", ".md", ".markdown")
_HEADING = re.compile(r"^(?=#{1,6} )", re.MULTILINE)  # of Markdown
_PARAGRAPH = re.compile(r"(?<=\n)(?=[ \t]*\n)")  # before a blank line


@dataclass(frozen=True, kw_only=True, slots=True)
class TextsSource:
    """UTF-8 text files (.txt, .md): a file, a folder with all below it, or a glob pattern.

    `unit`: what a document is, a whole file or the part from one Markdown heading to the next.
    `max_characters`: a longer one is cut at blank lines into several documents; null: never.
    `shuffle_buffer` as in `FilesSource`.
    """

    kind: Literal["texts"]
    path: str
    unit: Literal["file", "heading"]
    max_characters: PositiveInt | None
    shuffle_buffer: NonNegativeInt | None


def find_files(path: str, types: tuple[str, ...]) -> list[str]:
    """The files of a path, of a folder (all below it that have one of `types`) or of a glob
    pattern, sorted. Raises UserError where there is none."""
    if Path(path).is_dir():
        below = (str(file) for file in Path(path).rglob("*") if file.is_file())
        paths = sorted(file for file in below if file.lower().endswith(types))
    else:
        paths = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
    if not paths:
        raise UserError(
            f"corpus path '{path}': no such file, or a folder without any of {', '.join(types)};"
            " give a path, a folder or a glob pattern"
        )
    return paths


def file_names(paths: list[str]) -> list[str]:
    """A name for each file, without the folders of this machine: with those below their common
    folder where two files have the same name."""
    names = [Path(path).name for path in paths]
    if len(set(names)) < len(names):
        common = os.path.commonpath(paths)
        names = [os.path.relpath(path, common) for path in paths]
    return names


def read_texts(config: TextsSource) -> Iterator[Document]:
    """The documents of text files in the order of their names. Those of one file are a cluster.

    Raises UserError where there is no file, or one is not UTF-8.
    """
    paths = find_files(config.path, TEXT_FILE_TYPES)
    for path, name in zip(paths, file_names(paths), strict=True):
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: not UTF-8 text: {error}; convert it, for example with iconv -t UTF-8"
            ) from error
        parts = [part for part in _parts(text, config) if part.strip()]
        for index, part in enumerate(parts):
            doc_id = name if len(parts) == 1 else f"{name}:{index}"
            yield Document(doc_id=doc_id, text=part, source=name, cluster=name)


def _parts(text: str, config: TextsSource) -> Iterator[str]:
    for section in _HEADING.split(text) if config.unit == "heading" else [text]:
        if config.max_characters is None or len(section) <= config.max_characters:
            yield section
        else:
            yield from _cut(section, config.max_characters)


def _cut(text: str, max_characters: int) -> Iterator[str]:
    """Runs of paragraphs of at most `max_characters`; a longer paragraph stays whole."""
    pending = ""
    for paragraph in _PARAGRAPH.split(text):
        if pending and len(pending) + len(paragraph) > max_characters:
            yield pending
            pending = ""
        pending += paragraph
    yield pending
