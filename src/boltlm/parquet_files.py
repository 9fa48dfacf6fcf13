"""Parquet files as pyarrow reads them; errors of the library name the file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from boltlm.errors import UserError


@contextmanager
def named_errors(path: Path | str) -> Iterator[None]:
    """Raises UserError that names `path` for errors of the library and of the operating system."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run the stage that makes it (dvc repro)") from error
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: cannot be read as Parquet: {reason}; restore the file, or remove it and run"
            " what makes it again"
        ) from error


def read_schema(path: Path) -> pa.Schema:
    """The columns of a file. Raises UserError where it cannot be read."""
    with named_errors(path):
        return pq.read_schema(path)


def read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    """Columns of a file. Raises UserError where they cannot be read."""
    with named_errors(path):
        return pq.read_table(path, columns=list(names))


def require_columns(path: Path, schema: pa.Schema, optional: Sequence[str]) -> None:
    """Raises UserError where a file lacks a column of a schema that is not `optional`, or has it
    with another type."""
    present = read_schema(path)
    for field in schema:
        if field.name in optional and field.name not in present.names:
            continue
        if field.name not in present.names or present.field(field.name).type != field.type:
            raise UserError(f"{path}: column '{field.name}' ({field.type}) is missing or differs")
