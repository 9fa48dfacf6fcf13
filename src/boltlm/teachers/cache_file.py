"""The file of the response cache: its tables, and how damage to it is noticed.

SQLite reports a damaged page only when it reads it, and a response in a page or a `-wal` file that
is lost looks as if it had never been given: it would be paid for again. Therefore each response has
a checksum, and the table `totals` counts the responses and the transactions of the file. A small
file beside it, `<name>.state`, repeats these counts and, when the cache is closed, the sizes and
modification times of its files. On opening, the counts must not be lower than those of the state
file. Where sizes or times differ, because a process was killed or something else has changed the
file, all responses are checked.
"""

import json
import os
import sqlite3
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock

from boltlm.errors import UserError
from boltlm.teachers.cache_rows import NO_TOTALS, find_faults, read_totals, scan_responses

CACHE_VERSION = 1
LOCK_TIMEOUT_SECONDS = 60.0
# Larger files are checked by `boltlm cache check` only: reading them takes minutes.
MAX_BYTES_CHECKED_ON_OPENING = 4 * 2**30

# The first tables are those of the first version, in its order. Files without the column and the
# tables that come after them get them when they are opened; programs that do not know them can
# still use the file.
_TABLES = (
    """create table answers (
    key text, attempt integer, text text, finish text,
    input_tokens integer, output_tokens integer, cost_usd real, model text, batch text,
    at text default current_timestamp, primary key (key, attempt)) without rowid""",
    """create table batches (
    token text primary key, asker text, file text, batch text, expected_usd real,
    at text default current_timestamp)""",
    """create table asked (
    token text, key text, attempt integer, primary key (key, attempt)) without rowid""",
    "create index asked_token on asked (token)",
)
ADDITIONS = (
    "alter table answers add column checksum text",
    "create table totals (responses integer, changes integer)",
    "insert into totals select count(*), 0 from answers",
    """create trigger response_added after insert on answers begin
    update totals set responses = responses + 1; end""",
    """create trigger response_removed after delete on answers begin
    update totals set responses = responses - 1; end""",
    "create table remote_files (file text primary key, asker text)",
    # Repeats the rows, so that damage to them is noticed; `asked` has such an index too.
    "create index batches_copy on batches (token, asker, file, batch, expected_usd)",
)
_STATE_CHARACTERS = 200  # a fixed length, so that the state can be overwritten by a single call


@dataclass(frozen=True, slots=True)
class CacheState:
    """What the file `<name>.state` says. `responses` and `changes` as in the table `totals`;
    `files`: see `file_stats`, when the cache was closed, None while it is open."""

    responses: int
    changes: int
    files: list[int] | None = None


def state_path(path: Path) -> Path:
    """The state file of a cache file."""
    return path.with_name(f"{path.name}.state")


def read_cache_state(path: Path) -> CacheState | None:
    """The state of a cache file; None where there is none or it cannot be read."""
    try:
        return CacheState(**json.loads(state_path(path).read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_cache_state(path: Path, state: CacheState) -> None:
    """Replace the state of a cache file. It is not flushed to the disk: an older state misses a
    loss at worst, it never reports one that did not happen."""
    text = json.dumps(asdict(state)).ljust(_STATE_CHARACTERS - 1) + "\n"
    file = os.open(state_path(path), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(file, text.encode(), 0)
    finally:
        os.close(file)


def distrust(path: Path) -> None:
    """Have a cache file checked when it is opened the next time, because damage was found."""
    state = read_cache_state(path)
    if state is not None:
        write_cache_state(path, replace(state, files=None))


def is_damage(error: sqlite3.Error) -> bool:
    """Whether an error says that the content of a file is damaged, rather than that it cannot be
    read or written now."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # an error of the Python module itself
        return "decode" in str(error) or str(error) == NO_TOTALS
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def damage_error(path: Path, damage: str) -> UserError:
    """The error for a damaged or incomplete cache file."""
    return UserError(
        f"{path}: {damage}; responses that were paid for are at stake, so do not delete it. Restore"
        f" a copy, or save what can be read: boltlm cache export salvage.jsonl --cache {path}"
        " (docs/teachers.md, Damage)"
    )


def open_cache_file(path: Path, *, accept_loss: bool) -> tuple[sqlite3.Connection, bool]:
    """A connection to a cache file, which is created where it does not exist, and whether all of
    its content is known to be intact. `accept_loss`: it may lack responses that were saved in it.

    Raises UserError where the file is damaged, empty, or lacks what was saved in it, and
    sqlite3.Error where SQLite cannot open it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        state = read_cache_state(path)
        if not path.exists():
            _require_new(path, None if accept_loss else state)
            _create(path)
        elif path.stat().st_size == 0:
            raise damage_error(
                path,
                "the response cache is an empty file (if no response was ever saved in it, delete"
                f" it and {state_path(path).name})",
            )
        # Before SQLite opens it: recovery of the -wal file may change it.
        unchanged = state is not None and state.files == file_stats(path)
        connection = connect(path)
        try:
            _add_tables(path, connection)
            if state is not None and not accept_loss:
                _compare_counts(path, connection, state)
            verified = unchanged or _check_on_opening(path, connection)
            if verified and not unchanged:
                write_cache_state(path, CacheState(*read_totals(connection), file_stats(path)))
        except BaseException:
            connection.close()
            raise
        return connection, verified


def file_stats(path: Path) -> list[int]:
    """The sizes in bytes and the modification times in nanoseconds of a cache file and its `-wal`
    file; zeros for one that is missing or empty."""
    stats: list[int] = []
    for file in (path, _wal_path(path)):
        stat = file.stat() if file.exists() else None
        stats += [stat.st_size, stat.st_mtime_ns] if stat and stat.st_size else [0, 0]
    return stats


def _wal_path(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _require_new(path: Path, state: CacheState | None) -> None:
    wal = _wal_path(path)
    if wal.exists():
        raise damage_error(wal, f"the response cache {path.name} that belongs to it is missing")
    if state is not None and state.responses:
        raise damage_error(
            path,
            f"the response cache is missing, but {state.responses:,} responses were saved in it"
            f" (to start with a new one all the same, delete {state_path(path).name})",
        )


def _create(path: Path) -> None:
    """Create a file under a temporary name, so that an empty file is always a damaged one."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.unlink(missing_ok=True)
    connection = sqlite3.connect(temporary, isolation_level=None)
    try:
        connection.execute("pragma journal_mode = memory")
        connection.execute("begin")
        for statement in (*_TABLES, *ADDITIONS, f"pragma user_version = {CACHE_VERSION}"):
            connection.execute(statement)
        connection.execute("commit")
    finally:
        connection.close()
    temporary.replace(path)


def connect(path: Path) -> sqlite3.Connection:
    """A connection to an existing cache file that commits to the disk."""
    connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT_SECONDS, isolation_level=None)
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")
    return connection


def _add_tables(path: Path, connection: sqlite3.Connection) -> None:
    """Bring a file of an earlier version up to date, in one transaction."""
    (version,) = connection.execute("pragma user_version").fetchone()
    if version != CACHE_VERSION:
        raise UserError(
            f"{path}: a response cache of version {version}, but this program reads version"
            f" {CACHE_VERSION}; use the program that wrote it, or another file"
        )
    if connection.execute("select 1 from sqlite_master where name = 'totals'").fetchone() is None:
        connection.execute("begin immediate")
        for statement in ADDITIONS:
            connection.execute(statement)
        connection.execute("commit")


def _compare_counts(path: Path, connection: sqlite3.Connection, state: CacheState) -> None:
    responses, changes = read_totals(connection)
    if changes < state.changes:
        raise damage_error(
            path,
            f"the response cache holds {responses:,} responses, but {state.responses:,} were saved"
            f" in it: it is an older copy, or its file {_wal_path(path).name} is missing (to use it"
            f" as it is, delete {state_path(path).name})",
        )


def _check_on_opening(path: Path, connection: sqlite3.Connection) -> bool:
    """Check all responses unless the file is too large. Returns whether it has done so."""
    size = path.stat().st_size
    if size > MAX_BYTES_CHECKED_ON_OPENING:
        print(
            f"{path}: was not closed by the last run and is too large to be checked now; where"
            " anything but a run may have changed it, run: boltlm cache check",
            file=sys.stderr,
        )
        return False
    damage = find_faults(connection) or scan_responses(connection).damage
    if damage:
        raise damage_error(path, f"the response cache is damaged ({damage})")
    return True
