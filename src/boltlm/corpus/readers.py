"""Rows of JSONL files, Parquet files and data sets of the Hugging Face hub, as dictionaries."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.parquet as pq

from boltlm.errors import UserError
from boltlm.parquet_files import named_errors

DATA_FILE_TYPES = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")


def read_rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a file: Parquet if its name ends in `.parquet`, otherwise JSONL.

    Raises UserError naming the file where it cannot be read.
    """
    return read_parquet(path) if path.endswith(".parquet") else read_jsonl(path)


def read_jsonl(path: str) -> Iterator[dict[str, Any]]:
    """The objects of a UTF-8 JSONL file, gzip-compressed if its name ends in `.gz`; blank lines
    are skipped.

    Raises UserError naming the file, and the line where it is one line that is wrong.
    """
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: not JSON: {error}") from error
                except RecursionError:
                    message = f"{path}, line {number}: not JSON: nested too deeply"
                    raise UserError(message) from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: expected one JSON object on each line")
                yield row
    except (gzip.BadGzipFile, zlib.error, UnicodeDecodeError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 JSONL: {error}") from error


def read_parquet(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, one batch in memory at a time.

    Raises UserError naming the file where it is not Parquet.
    """
    with named_errors(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def read_text(row: Mapping[str, Any], column: str, location: str) -> str:
    """A column's text. Raises UserError where it is none, or cannot be written as UTF-8."""
    text = optional_text(row, column, location)
    if text is None:
        raise UserError(f"{location}: column '{column}' is not text, found None")
    return text


def optional_text(row: Mapping[str, Any], column: str, location: str) -> str | None:
    """A column's text or null. Raises UserError as `read_text` does."""
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{location}: column '{column}' is not text, found {_shortened(value)}")
    return None if value is None else _encodable(value, column, location)


def read_label(row: Mapping[str, Any], column: str, location: str) -> str:
    """A column's text or number, as text. Raises UserError for other values."""
    value = row[column]
    if not isinstance(value, str | int | float) or value == "":
        raise UserError(
            f"{location}: column '{column}' must be a text or a number, found {_shortened(value)}"
        )
    return _encodable(str(value), column, location)


def _encodable(text: str, column: str, location: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{location}: column '{column}' has half of a surrogate pair") from None
    return text


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def is_file_name(path: str) -> bool:
    """Whether a path or hub name is that of a file or a glob pattern of files."""
    return path.endswith(DATA_FILE_TYPES)


def split_revision(name: str) -> tuple[str, str | None]:
    """The repository and the revision in a hub name `<owner>/<name>@<revision>`."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def stream_hub(name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    """The rows of one split of a Hugging Face data set, downloaded as they are read. `name` may end
    in `@<revision>`: a commit, tag or branch.

    Raises UserError naming the data set where it cannot be opened.
    """
    import datasets  # slow to import, and only data of the hub need it

    repository, revision = split_revision(name)
    try:
        for row in datasets.load_dataset(
            repository, config, split=split, revision=revision, streaming=True
        ):
            yield dict(row)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Hugging Face data set '{name}' ({split}): {reason}") from error
