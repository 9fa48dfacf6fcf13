"""What `boltlm init` measures of a text: its files, documents, columns, sentences and tokens."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boltlm.corpus.chunks import split_sentences
from boltlm.corpus.readers import DATA_FILE_TYPES, read_rows
from boltlm.corpus.sources import ColumnMapping, FilesSource, read_documents
from boltlm.corpus.text_files import TEXT_FILE_TYPES, TextsSource, find_files
from boltlm.errors import UserError

MIN_DOCUMENTS = 20
MAX_DOCUMENTS = 50_000  # more are not counted
SAMPLE_DOCUMENTS = 200  # whose sentences and tokens are measured
_LIKELY_COLUMNS = ("text", "content", "body")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextProfile:
    """A text as a source of params.yaml, and its measures. `folder`: the file or folder that holds
    all of it; `sample`: some of its texts; `sentence_characters`: mean length of a sentence."""

    source: FilesSource | TextsSource
    folder: str
    files: int
    documents: int
    characters: float
    sentence_characters: float
    sample: tuple[str, ...]

    @property
    def is_counted(self) -> bool:
        """Whether all documents were counted."""
        return self.documents < MAX_DOCUMENTS


def profile_text(
    path: str, *, column: str | None, by_heading: bool, max_characters: int | None
) -> TextProfile:
    """Measure the text at a path, folder or glob pattern. `column`: of data files; `by_heading` and
    `max_characters`: of text files.

    Raises UserError where it cannot be read as a corpus, or has too few documents.
    """
    files = _files(path)
    is_text = files[0].lower().endswith(TEXT_FILE_TYPES)
    if is_text and column:
        raise UserError(f"--column {column}: text files have no columns; leave it out")
    if not is_text and by_heading:
        raise UserError("--by-heading is for .txt and Markdown files; leave it out")
    source: FilesSource | TextsSource
    if is_text:
        unit = "heading" if by_heading else "file"
        source = TextsSource(
            kind="texts", path=path, unit=unit, max_characters=max_characters, shuffle_buffer=0
        )
    else:
        source = FilesSource(
            kind="files", path=path, columns=_columns(files[0], column), shuffle_buffer=0
        )
    return _measured(source, files)


def _files(path: str) -> list[str]:
    """The files of a corpus, all of one kind. Raises UserError where there are none or others."""
    if not Path(path).exists() and not re.search(r"[*?\[]", path):
        raise UserError(f"--text {path}: no such file or folder")
    kinds = {"text": TEXT_FILE_TYPES, "data": DATA_FILE_TYPES}
    types = (*TEXT_FILE_TYPES, *DATA_FILE_TYPES)
    readable = f"{', '.join(types)} can be read"
    files = find_files(path, types)
    if other := [file for file in files if not file.lower().endswith(types)]:
        raise UserError(f"--text {path}: {other[0]} is of another type; {readable}, so convert it")
    found = {kind: [f for f in files if f.lower().endswith(kinds[kind])] for kind in kinds}
    if found["text"] and found["data"]:
        raise UserError(
            f"--text {path}: there are text files ({found['text'][0]}) and data files"
            f" ({found['data'][0]}); give a pattern for one of them, such as '{path}/*.txt'"
        )
    return files


def _columns(file: str, column: str | None) -> ColumnMapping:
    """The columns with the text and the id. Raises UserError where the text's is not clear."""
    rows: list[dict[str, Any]] = list(itertools.islice(read_rows(file), 100))
    if not rows:
        raise UserError(f"{file}: it has no row")
    texts = [key for key in rows[0] if all(isinstance(row.get(key), str) for row in rows)]
    if column is not None and column not in texts:
        raise UserError(
            f"--column {column}: {file} has no such column of text; it has {', '.join(texts)}"
        )
    likely = [key for key in _LIKELY_COLUMNS if key in texts][:1]
    likely = likely or (texts if len(texts) == 1 else [])
    if column is None and not likely:
        found = ", ".join(texts) or f"none among {', '.join(rows[0])}"
        raise UserError(
            f"{file}: which column is the text? Give --column; columns of text: {found}"
        )
    ids = [row.get("id") for row in rows]
    has_ids = None not in ids and len(set(map(str, ids))) == len(ids)
    return ColumnMapping(
        text=column or likely[0],
        doc_id="id" if has_ids else None,
        cluster=None,
        latent=None,
        pieces=None,
    )


def _measured(source: FilesSource | TextsSource, files: Sequence[str]) -> TextProfile:
    count = total = 0
    sample: list[str] = []
    for document in itertools.islice(read_documents(source, 0), MAX_DOCUMENTS):
        count += 1
        total += len(document.text)
        if len(sample) < SAMPLE_DOCUMENTS and document.text.strip():
            sample.append(document.text)
    if count < MIN_DOCUMENTS:
        advice = (
            "give --max-characters 1000 or --by-heading, which make more of them"
            if isinstance(source, TextsSource)
            else "give more text"
        )
        raise UserError(
            f"--text {source.path}: {count} documents in {len(files)} files, at least"
            f" {MIN_DOCUMENTS} are needed; {advice}"
        )
    if not sample:
        raise UserError(f"--text {source.path}: none of its {count} documents has any text")
    sentences = [len(s) for text in sample for s in split_sentences(text)]
    fixed, *_ = re.split(r"[*?\[]", source.path)
    folder = source.path if Path(source.path).exists() else str(Path(f"{fixed}x").parent)
    return TextProfile(
        source=source,
        folder=folder,
        files=len(files),
        documents=count,
        characters=total / count,
        sentence_characters=sum(sentences) / len(sentences),
        sample=tuple(sample),
    )
