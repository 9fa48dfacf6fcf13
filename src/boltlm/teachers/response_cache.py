"""The response cache: every response that a teacher ever gave, and every batch in progress.

A SQLite file in WAL mode. It is not an output of any stage, and all presets and queued experiments
share it, so that no response is paid for twice. Responses are identified by the key of the request
and the number of the attempt, and they are never deleted. A batch is deleted when its results have
been read.

The names of tables and columns belong to the file format: existing files must stay readable.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from boltlm.errors import UserError

CACHE_VERSION = 1
LOCK_TIMEOUT_SECONDS = 60.0
CACHE_SCHEMA = """
create table answers (
    key text, attempt integer, text text, finish text,
    input_tokens integer, output_tokens integer, cost_usd real, model text, batch text,
    at text default current_timestamp, primary key (key, attempt)) without rowid;
create table batches (
    token text primary key, asker text, file text, batch text, expected_usd real,
    at text default current_timestamp);
create table asked (
    token text, key text, attempt integer, primary key (key, attempt)) without rowid;
create index asked_token on asked (token);
"""


@dataclass(frozen=True, slots=True)
class TeacherResponse:
    """A row of the table `answers`: the response to one attempt at a request.

    `finish`: the reason why the text ended: stop, length, refused, or another word of the API.
    `cost_usd`: the cost of this response alone. `batch`: the id of its batch, or an empty string.
    """

    key: str
    attempt: int
    text: str
    finish: str
    input_tokens: int
    output_tokens: int
    cost_usd: float
    model: str
    batch: str = ""


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """A row of the table `batches`: a batch whose results have not been read yet.

    `token` is generated here and stored in the batch's metadata, so that the batch can be found
    even if the process died before its id was saved. `teacher`: fingerprint of the teacher's
    sampling facts. `file` and `id`, which the server assigns, are empty until they are known.
    `expected_usd`: the expected cost of all its requests.
    """

    token: str
    teacher: str
    file: str
    id: str
    expected_usd: float


class ResponseCache:
    """One connection to a cache file, which is created where it does not exist. A connection must
    not be used by two threads.

    As a context manager it is a transaction: all changes are saved on leaving it, or none after an
    exception. Raises UserError where the file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        try:
            self.connection = sqlite3.connect(
                path, timeout=LOCK_TIMEOUT_SECONDS, isolation_level=None
            )
            self.connection.execute("pragma journal_mode = wal")
            self.connection.execute("pragma synchronous = full")
            self._create_tables()
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{path}: the response cache cannot be opened ({error}); it holds responses that"
                " were paid for, so repair it or restore a copy, but do not delete it"
            ) from error

    def _create_tables(self) -> None:
        with self:
            (version,) = self.connection.execute("pragma user_version").fetchone()
            if version == 0:
                for statement in CACHE_SCHEMA.split(";"):
                    self.connection.execute(statement)
                self.connection.execute(f"pragma user_version = {CACHE_VERSION}")
            elif version != CACHE_VERSION:
                raise UserError(
                    f"{self.path}: a response cache of version {version}, but this program reads"
                    f" version {CACHE_VERSION}; use the program that wrote it, or another file"
                )

    def __enter__(self) -> "ResponseCache":
        try:
            self.connection.execute("begin immediate")
        except sqlite3.OperationalError as error:
            raise self._write_error(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        try:
            if kind is None:
                self.connection.execute("commit")
        except sqlite3.OperationalError as commit_error:
            error = commit_error
        if self.connection.in_transaction:
            self.connection.execute("rollback")
        if isinstance(error, sqlite3.OperationalError):
            raise self._write_error(error) from error

    def _write_error(self, error: sqlite3.Error) -> UserError:
        return UserError(
            f"{self.path}: the response cache cannot be written ({error}); resolve this and run"
            " the stage again"
        )

    def close(self) -> None:
        self.connection.close()

    def responses(self, key: str) -> list[TeacherResponse]:
        """The responses to all attempts at a request, in the order of the attempts."""
        rows = self.connection.execute(
            "select key, attempt, text, finish, input_tokens, output_tokens, cost_usd, model, batch"
            " from answers where key = ? order by attempt",
            (key,),
        )
        return [TeacherResponse(*row) for row in rows]

    def add(self, responses: Iterable[TeacherResponse]) -> None:
        """Save responses. One that is already saved stays as it is."""
        with self:
            self._insert(responses)

    def _insert(self, responses: Iterable[TeacherResponse]) -> None:
        self.connection.executemany(
            "insert or ignore into answers (key, attempt, text, finish, input_tokens,"
            " output_tokens, cost_usd, model, batch) values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (astuple(response) for response in responses),
        )

    def reset_occurrences(self) -> None:
        """Forget which keys `is_first_occurrence` has seen."""
        # A table on disk, because a large corpus has more keys than fit into memory.
        self.connection.execute("drop table if exists temp.counted")
        self.connection.execute("create temp table counted (key text primary key) without rowid")

    def is_first_occurrence(self, key: str) -> bool:
        """Whether this is the first call with this key since `reset_occurrences`. Equal chunks have
        equal keys, so several chunks may share a response, which must be counted once."""
        cursor = self.connection.execute("insert or ignore into temp.counted values (?)", (key,))
        return cursor.rowcount == 1

    def is_in_batch(self, key: str, attempt: int) -> bool:
        """Whether an attempt at a request is part of a pending batch."""
        row = self.connection.execute(
            "select 1 from asked where key = ? and attempt = ?", (key, attempt)
        ).fetchone()
        return row is not None

    def pending_batches(self, teacher: str) -> list[PendingBatch]:
        """The pending batches of a teacher, oldest first."""
        rows = self.connection.execute(
            "select token, asker, file, batch, expected_usd from batches where asker = ?"
            " order by at, token",
            (teacher,),
        )
        return [PendingBatch(*row) for row in rows]

    def batch_requests(self, token: str) -> set[tuple[str, int]]:
        """(key, attempt) of every request of a pending batch."""
        rows = self.connection.execute("select key, attempt from asked where token = ?", (token,))
        return set(rows)

    def add_batch(self, batch: PendingBatch, requests: Sequence[tuple[str, int]]) -> None:
        """Save a batch and the (key, attempt) of its requests, before anything is sent."""
        with self:
            self.connection.execute(
                "insert into batches (token, asker, file, batch, expected_usd)"
                " values (?, ?, ?, ?, ?)",
                astuple(batch),
            )
            self.connection.executemany(
                "insert into asked values (?, ?, ?)",
                ((batch.token, key, attempt) for key, attempt in requests),
            )

    def update_batch(self, token: str, *, file: str, id: str) -> None:
        """Save the ids that the server assigned to a batch's file and to the batch itself."""
        with self:
            self.connection.execute(
                "update batches set file = ?, batch = ? where token = ?", (file, id, token)
            )

    def complete_batch(self, token: str, responses: Iterable[TeacherResponse]) -> None:
        """Save the responses of a batch and delete the batch. Requests of it that have no response
        are no longer pending."""
        with self:
            self._insert(responses)
            self.connection.execute("delete from asked where token = ?", (token,))
            self.connection.execute("delete from batches where token = ?", (token,))
