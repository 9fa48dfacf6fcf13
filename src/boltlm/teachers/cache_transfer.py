"""The commands `boltlm cache check`, `export`, `import` and `forget`: find damage to a response
cache, save what can be read of it, add saved responses to a cache, and give up a batch.

An export is a file of JSON Lines: one line for each response, with its checksum, for each pending
batch, and for each charge without a response. What cannot be read by SQLite is read page by page.
"""

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from boltlm.errors import UserError
from boltlm.shard_store import atomic_write
from boltlm.teachers.cache_file import read_cache_state
from boltlm.teachers.cache_rows import (
    RESPONSE_COLUMNS,
    decode_row,
    find_faults,
    read_totals,
    row_checksum,
    scan_responses,
)
from boltlm.teachers.cache_salvage import salvage_rows
from boltlm.teachers.charges import FORGOTTEN, Charge, add_charges, merge_charges, select_charges
from boltlm.teachers.response_cache import PendingBatch, ResponseCache, TeacherResponse

_SQLITE_HEADER = b"SQLite format 3\0"
_PAGE_BYTES = 4096  # the size that SQLite chooses


@dataclass(slots=True)
class CacheContents:
    """What has been read of a cache or an export so far. `damaged`: rows or lines whose content is
    not what was saved. `unreadable`: whether some rows could not be read at all."""

    responses: int = 0
    batches: list[tuple[PendingBatch, list[tuple[str, int]]]] = field(default_factory=list)
    charges: list[Charge] = field(default_factory=list[Charge])
    damaged: int = 0
    unreadable: bool = False

    def describe(self) -> str:
        """The numbers in words."""
        text = f"{self.responses:,} responses and {len(self.batches):,} pending batches"
        if self.damaged:
            text += f"; {self.damaged:,} damaged ones are left out"
        return text + ("; a part of the file cannot be read" if self.unreadable else "")


def check_cache(path: Path) -> str:
    """Read all of a cache. Returns a summary; raises UserError where anything is damaged."""
    _require_file(path)
    with closing(ResponseCache(path)) as cache:
        try:
            faults = find_faults(cache.connection)
            report = scan_responses(cache.connection)
            ((batches,),) = cache.connection.execute("select count(*) from batches")
        except sqlite3.DatabaseError as error:
            raise cache.damaged(str(error)) from error
        if faults or report.damage:
            raise cache.damaged(faults or report.damage)
        cache.verified = True  # also where it was too large to be checked when it was opened
    text = f"{path}: intact; {report.responses:,} responses for ${report.cost_usd:.4f}"
    text += f", {batches:,} pending batches"
    if report.without_checksum:
        text += (
            f"; {report.without_checksum:,} responses of an earlier version have no checksum, so"
            " that their content cannot be checked"
        )
    return text


def export_cache(path: Path, out: Path) -> str:
    """Write all that can be read of a cache, also of a damaged one, to a file of JSON Lines."""
    _require_file(path)
    if out.exists():
        raise UserError(f"{out} exists; give the name of a new file")
    contents = CacheContents()
    with atomic_write(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for response in _read_sqlite(path, contents, out.parent):
            line = {**asdict(response), "checksum": row_checksum(astuple(response))}
            file.write(json.dumps(line) + "\n")
        for batch, requests in contents.batches:
            file.write(json.dumps({**asdict(batch), "requests": requests}) + "\n")
        for charge in contents.charges:
            file.write(json.dumps({"charge": asdict(charge)}) + "\n")
    return f"{out}: {contents.describe()}"


def import_cache(path: Path, source: Path) -> str:
    """Add the responses and pending batches of an export or of another cache to a cache, which is
    created where it does not exist. A response that is there stays as it is."""
    if not source.is_file():
        raise UserError(f"{source}: no such file; give an export or a copy of a response cache")
    with source.open("rb") as file:
        is_sqlite = file.read(len(_SQLITE_HEADER)) == _SQLITE_HEADER
    contents = CacheContents()
    if is_sqlite:
        responses = _read_sqlite(source, contents, path.parent)
    else:
        responses = _read_export(source, contents)
    before = read_cache_state(path)
    with closing(ResponseCache(path, accept_loss=True)) as cache:
        # Batches and charges of `contents` are complete when the last response has been read.
        num_added, num_other = cache.merge(responses, contents.batches)
        merge_charges(cache, contents.charges)
        total, _ = read_totals(cache.connection)
    text = f"{path}: {num_added:,} responses added, {total:,} in all; {source}: "
    text += contents.describe()
    if num_other:
        text += f"; {num_other:,} differ from those in the cache, which stay"
    if before is not None and total < before.responses:
        text += f"; {before.responses - total:,} responses that were saved are still missing"
    return text


def forget_batch(path: Path, batch_id: str) -> str:
    """Give up a pending batch, so that its requests are sent again. What it may have cost counts as
    spent."""
    _require_file(path)
    with closing(ResponseCache(path)) as cache:
        batch = cache.find_batch(batch_id)
        if batch is None:
            raise UserError(f"{path}: no pending batch has the id {batch_id}")
        count = len(cache.batch_requests(batch.token))
        add_charges(cache, [Charge(batch.teacher, FORGOTTEN, batch.max_usd, estimated=True)])
        cache.complete_batch(batch, [])
    return (
        f"{path}: {batch_id} is given up; its {count:,} requests will be sent and paid for again,"
        f" and the most that it can have cost, ${batch.max_usd:.4f}, counts towards max_cost_usd"
    )


def _require_file(path: Path) -> None:
    if not path.exists() and read_cache_state(path) is None:
        raise UserError(f"{path}: no such response cache; give its path with --cache")


def _read_export(path: Path, contents: CacheContents) -> Iterator[TeacherResponse]:
    with path.open("rb") as file:
        for line in file:
            try:
                values: dict[str, Any] = json.loads(line)
                if "token" in values:
                    requests = [(str(key), int(attempt)) for key, attempt in values.pop("requests")]
                    contents.batches.append((PendingBatch(**values), requests))
                    continue
                if "charge" in values:
                    contents.charges.append(Charge(**values["charge"]))
                    continue
                checksum = values.pop("checksum")
                response = TeacherResponse(**values)
            except (ValueError, TypeError, KeyError, AttributeError):
                contents.damaged += 1
                continue
            if checksum == row_checksum(astuple(response)):
                contents.responses += 1
                yield response
            else:
                contents.damaged += 1
    if not contents.responses and not contents.batches:
        raise UserError(f"{path}: neither a response cache nor an export of one")


def _read_sqlite(path: Path, contents: CacheContents, folder: Path) -> Iterator[TeacherResponse]:
    """All that can be read of a cache. It is read in a copy in a temporary folder in `folder`,
    because SQLite may change what it reads."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        copy = Path(temporary) / path.name
        for suffix in ("", "-wal"):
            file = path.with_name(path.name + suffix)
            if file.exists():
                shutil.copyfile(file, copy.with_name(file.name))
        with closing(sqlite3.connect(copy)) as connection:
            try:
                columns = [row[1] for row in connection.execute("pragma table_info(answers)")]
                contents.unreadable = not columns or bool(find_faults(connection))
                # Bring the content of the -wal file into the file itself.
                connection.execute("pragma wal_checkpoint(truncate)")
            except sqlite3.DatabaseError:
                columns, contents.unreadable = [], True
            connection.text_factory = bytes
            if contents.unreadable:
                rows = salvage_rows(copy, _PAGE_BYTES)
            else:
                checksum = "checksum" if "checksum" in columns else "null"
                rows = connection.execute(f"select {RESPONSE_COLUMNS}, {checksum} from answers")
            yield from _decode_rows(rows, contents)
            connection.text_factory = str
            _read_batches(connection, contents)


def _decode_rows(
    rows: Iterable[Sequence[object]], contents: CacheContents
) -> Iterator[TeacherResponse]:
    keys: set[tuple[str, int]] = set()
    for row in rows:
        values = decode_row(row)
        if values is None:
            contents.damaged += 1
        elif values[:2] not in keys:
            keys.add(values[:2])
            contents.responses += 1
            yield TeacherResponse(*values)


def _read_batches(connection: sqlite3.Connection, contents: CacheContents) -> None:
    try:
        batches = connection.execute(
            "select token, asker, file, batch, expected_usd from batches"
        ).fetchall()
        for batch in batches:
            query = "select key, attempt from asked where token = ?"
            requests = connection.execute(query, (batch[0],)).fetchall()
            contents.batches.append((PendingBatch(*batch), requests))
        contents.charges += select_charges(connection)
    except sqlite3.DatabaseError:
        contents.unreadable = True
