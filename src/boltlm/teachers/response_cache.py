"""The response cache: every response that a teacher ever gave, and every batch in progress.

A SQLite file in WAL mode. It is not an output of any stage, and all presets and queued experiments
share it, so that no response is paid for twice. Responses are identified by the key of the request
and the number of the attempt, and they are never deleted. A batch is deleted when its results have
been read.

The names of tables and columns belong to the file format: existing files must stay readable. See
`boltlm.teachers.cache_file` for how damage to the file is noticed.
"""

import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from boltlm.errors import UserError, redact_secrets
from boltlm.teachers.cache_file import (
    CacheState,
    damage_error,
    distrust,
    file_stats,
    is_damage,
    open_cache_file,
    write_cache_state,
)
from boltlm.teachers.cache_rows import RESPONSE_COLUMNS, read_totals, row_checksum

_MAX_MESSAGE_CHARACTERS = 80
_BATCHES = "select token, asker, file, batch, expected_usd from batches"
# On disk, as `counted` below: there may be more responses than fit into memory.
_VERDICTS = """create temp table verdicts (
    key text, attempt integer, reason text, primary key (key, attempt)) without rowid"""


@dataclass(frozen=True, slots=True)
class TeacherResponse:
    """A row of the table `answers`: the response to one attempt at a request.

    `finish`: the reason why the text ended: stop, length, refused, or another word of the API.
    `input_tokens`: 0 where the server has not reported the usage. `cost_usd`: the cost of this
    response alone. `batch`: the id of its batch, or an empty string.
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

    @property
    def is_estimated(self) -> bool:
        """Whether `cost_usd` is the most that the response can have cost, for want of a usage."""
        return self.input_tokens == 0


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """A row of the table `batches`: a batch whose results have not been read yet.

    `token` is generated here and stored in the batch's metadata, so that the batch can be found
    even if the process died before its id was saved. `teacher`: fingerprint of the teacher's
    sampling facts. `file` and `id`, which the server assigns, are empty until they are known.
    `max_usd`: the most that all its requests can cost.
    """

    token: str
    teacher: str
    file: str
    id: str
    max_usd: float


class ResponseCache:
    """One connection to a cache file, which is created where it does not exist. A connection must
    not be used by two threads.

    As a context manager it is a transaction: all changes are saved on leaving it, or none after an
    exception. `accept_loss`: the file may lack responses that were saved in it. Raises UserError
    where the file is damaged, also later, and where it cannot be opened or written.
    """

    def __init__(self, path: Path, *, accept_loss: bool = False) -> None:
        self.path = path
        try:
            self.connection, self.verified = open_cache_file(path, accept_loss=accept_loss)
        except sqlite3.DatabaseError as error:
            raise self._user_error(error, "opened") from error
        self.connection.execute(_VERDICTS)

    def __enter__(self) -> "ResponseCache":
        try:
            self.connection.execute("begin immediate")
        except sqlite3.DatabaseError as error:
            raise self._user_error(error, "written") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        try:
            if kind is None:
                self.connection.execute("update totals set changes = changes + 1")
                state = CacheState(*read_totals(self.connection))
                self.connection.execute("commit")
                write_cache_state(self.path, state)
        except sqlite3.DatabaseError as commit_error:
            error = commit_error
        if self.connection.in_transaction:
            self.connection.execute("rollback")
        if isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError:
            raise self._user_error(error, "written") from error

    def _user_error(self, error: sqlite3.Error, action: str) -> UserError:
        if is_damage(error):
            # The message may quote a text of many lines.
            return self.damaged(str(error).splitlines()[0][:_MAX_MESSAGE_CHARACTERS])
        return UserError(
            f"{self.path}: the response cache cannot be {action} ({error}); resolve this and run"
            " the stage again, and do not delete the file: it holds responses that were paid for"
        )

    def damaged(self, damage: str) -> UserError:
        """The error to raise where damage was found. The file will be checked when it is opened
        again."""
        self.verified = False
        distrust(self.path)
        return damage_error(self.path, f"the response cache is damaged ({damage})")

    def _read(self, query: str, values: Sequence[str | int]) -> list[tuple[Any, ...]]:
        """All rows of a query. Raises UserError where the file is damaged or cannot be read."""
        try:
            return self.connection.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise self._user_error(error, "read") from error

    def log(self, text: str) -> None:
        """Append a line with the time to the log beside the file."""
        with self.path.with_suffix(".log").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {redact_secrets(text)}\n")

    def close(self) -> None:
        """Close the connection and, where all of the file is known to be intact, say so in its
        state, so that it need not be checked when it is opened again."""
        try:
            totals = read_totals(self.connection) if self.verified else None
        except sqlite3.DatabaseError:
            totals = None  # the next one to open the file will check it
        self.connection.close()
        if totals is not None:
            write_cache_state(self.path, CacheState(*totals, file_stats(self.path)))

    def responses(self, key: str) -> list[TeacherResponse]:
        """The responses to all attempts at a request, in the order of the attempts. Raises
        UserError where the content of one of them is not what was saved."""
        query = f"select {RESPONSE_COLUMNS}, checksum from answers where key = ? order by attempt"
        rows = self._read(query, (key,))
        for *values, checksum in rows:
            if checksum is not None and checksum != row_checksum(values):
                raise self.damaged(
                    f"the response to attempt {values[1]} of request {key} does not match its"
                    " checksum"
                )
        return [TeacherResponse(*values) for *values, _ in rows]

    def add(self, responses: Iterable[TeacherResponse]) -> None:
        """Save responses. One that is already saved stays as it is."""
        with self:
            self._insert(responses)

    def merge(
        self,
        responses: Iterable[TeacherResponse],
        batches: Iterable[tuple[PendingBatch, Sequence[tuple[str, int]]]],
    ) -> tuple[int, int]:
        """Save the responses and pending batches of another cache, all or none. What is already
        saved stays as it is, and so a batch whose requests are all answered or pending here is left
        out. Returns how many responses were added, and how many differ from those that stay."""
        num_added = num_other = 0
        with self:
            for response in responses:
                saved = [r for r in self.responses(response.key) if r.attempt == response.attempt]
                num_added += not saved
                num_other += saved not in ([], [response])
                self._insert([response])
            for batch, requests in batches:
                new = [pair for pair in requests if not self._is_known(*pair)]
                if new:
                    self._insert_batch(batch, new)
        return num_added, num_other

    def _is_known(self, key: str, attempt: int) -> bool:
        is_answered = any(response.attempt == attempt for response in self.responses(key))
        return is_answered or self.is_in_batch(key, attempt)

    def _insert(self, responses: Iterable[TeacherResponse]) -> None:
        self.connection.executemany(
            f"insert or ignore into answers ({RESPONSE_COLUMNS}, checksum)"
            " values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            ((*row, row_checksum(row)) for row in map(astuple, responses)),
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

    def verdict(self, response: TeacherResponse, judge: Callable[[], str | None]) -> str | None:
        """What `judge` says of a response. It is asked only once over this connection: a run looks
        at each response several times, and counting its tokens takes most of the time."""
        request = (response.key, response.attempt)
        query = "select reason from temp.verdicts where key = ? and attempt = ?"
        row = self.connection.execute(query, request).fetchone()
        if row is None:
            row = (judge(),)
            self.connection.execute("insert into temp.verdicts values (?, ?, ?)", (*request, *row))
        return row[0]

    def is_in_batch(self, key: str, attempt: int) -> bool:
        """Whether an attempt at a request is part of a pending batch."""
        query = "select 1 from asked where key = ? and attempt = ?"
        return bool(self._read(query, (key, attempt)))

    def pending_batches(self, teacher: str) -> list[PendingBatch]:
        """The pending batches of a teacher, oldest first."""
        rows = self._read(f"{_BATCHES} where asker = ? order by at, token", (teacher,))
        return [PendingBatch(*row) for row in rows]

    def find_batch(self, batch_id: str) -> PendingBatch | None:
        """The pending batch with this id, of any teacher."""
        rows = self._read(f"{_BATCHES} where batch = ?", (batch_id,))
        return next((PendingBatch(*row) for row in rows), None)

    def batch_requests(self, token: str) -> set[tuple[str, int]]:
        """(key, attempt) of every request of a pending batch."""
        rows = self._read("select key, attempt from asked where token = ?", (token,))
        return {(key, attempt) for key, attempt in rows}

    def add_batch(self, batch: PendingBatch, requests: Sequence[tuple[str, int]]) -> None:
        """Save a batch and the (key, attempt) of its requests, before anything is sent."""
        with self:
            self._insert_batch(batch, requests)

    def _insert_batch(self, batch: PendingBatch, requests: Sequence[tuple[str, int]]) -> None:
        self.connection.execute(
            "insert into batches (token, asker, file, batch, expected_usd) values (?, ?, ?, ?, ?)",
            astuple(batch),
        )
        self.connection.executemany(
            "insert into asked values (?, ?, ?)",
            ((batch.token, key, attempt) for key, attempt in requests),
        )

    def update_batch(self, token: str, *, file: str, id: str) -> None:
        """Save the ids that the server assigned to a batch's file and to the batch itself."""
        with self:
            query = "update batches set file = ?, batch = ? where token = ?"
            self.connection.execute(query, (file, id, token))

    def complete_batch(
        self,
        batch: PendingBatch,
        responses: Iterable[TeacherResponse],
        *,
        remote_files: Iterable[str] = (),
    ) -> None:
        """Save the responses of a batch and delete the batch. Requests of it that have no response
        are no longer pending. `remote_files`: ids of files at the server that are no longer needed;
        they are remembered until `forget_remote_file`."""
        with self:
            self._insert(responses)
            self.connection.execute("delete from asked where token = ?", (batch.token,))
            self.connection.execute("delete from batches where token = ?", (batch.token,))
            self.connection.executemany(
                "insert or ignore into remote_files values (?, ?)",
                ((file, batch.teacher) for file in remote_files),
            )

    def remote_files(self, teacher: str) -> list[str]:
        """The ids of a teacher's files at the server that are no longer needed."""
        rows = self._read("select file from remote_files where asker = ?", (teacher,))
        return [file for (file,) in rows]

    def forget_remote_file(self, file: str) -> None:
        """A file has been deleted at the server."""
        with self:
            self.connection.execute("delete from remote_files where file = ?", (file,))
