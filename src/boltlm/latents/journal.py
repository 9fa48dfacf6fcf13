"""Every answer that a teacher ever gave, and every batch under way: what was paid for is kept.

A SQLite file in WAL mode, outside the outputs of any stage, shared by all presets and queued
experiments. Answers are known by (key of the request, attempt). Nothing is ever deleted but the
list of requests of a batch that has been read.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from boltlm.errors import UserError

VERSION = 1
WAIT_SECONDS = 60.0
TABLES = """
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
class Answer:
    """What came back. `finish`: stop, length, refused or another of the API's own words;
    `cost_usd`: what this one answer cost; `batch`: its batch's id, or empty."""

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
class Batch:
    """A batch under way. `token` is ours and stands in the batch's metadata, so that a batch is
    found again although its id was never written down; `file` and `id` are empty until known."""

    token: str
    asker: str
    file: str
    id: str
    expected_usd: float


class Journal:
    """Opens or makes the file. One connection: a thread that writes has a journal of its own."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        try:
            self.connection = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)
            self.connection.execute("pragma journal_mode = wal")
            self.connection.execute("pragma synchronous = full")
            self._create()
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{path}: the journal of answers cannot be opened ({error}); it holds what was"
                " paid for, so repair it or restore a copy, and do not delete it"
            ) from error

    def _create(self) -> None:
        with self:
            (version,) = self.connection.execute("pragma user_version").fetchone()
            if version == 0:
                for statement in TABLES.split(";"):
                    self.connection.execute(statement)
                self.connection.execute(f"pragma user_version = {VERSION}")
            elif version != VERSION:
                raise UserError(f"{self.path}: a journal of another version ({version})")

    def __enter__(self) -> "Journal":
        """One transaction: all that is done inside is kept, or nothing."""
        try:
            self.connection.execute("begin immediate")
        except sqlite3.OperationalError as error:
            raise self._trouble(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        try:
            if kind is None:
                self.connection.execute("commit")
        except sqlite3.OperationalError as failed:
            error = failed
        if self.connection.in_transaction:
            self.connection.execute("rollback")
        if isinstance(error, sqlite3.OperationalError):
            raise self._trouble(error) from error

    def _trouble(self, error: sqlite3.Error) -> UserError:
        return UserError(f"{self.path}: the journal cannot be written: {error}; then run again")

    def close(self) -> None:
        self.connection.close()

    def answers(self, key: str) -> list[Answer]:
        """All attempts at a request, in order."""
        rows = self.connection.execute(
            "select key, attempt, text, finish, input_tokens, output_tokens, cost_usd, model, batch"
            " from answers where key = ? order by attempt",
            (key,),
        )
        return [Answer(*row) for row in rows]

    def add(self, answers: Iterable[Answer]) -> None:
        """Keep answers; one that is there already stays as it is."""
        with self:
            self._add(answers)

    def _add(self, answers: Iterable[Answer]) -> None:
        self.connection.executemany(
            "insert or ignore into answers (key, attempt, text, finish, input_tokens,"
            " output_tokens, cost_usd, model, batch) values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (astuple(answer) for answer in answers),
        )

    def count_anew(self) -> None:
        """Begin a count in which each request counts once, however many chunks it answers."""
        self.connection.execute("drop table if exists temp.counted")
        self.connection.execute("create temp table counted (key text primary key) without rowid")

    def counts(self, key: str) -> bool:
        """Whether a request comes for the first time in this count."""
        cursor = self.connection.execute("insert or ignore into temp.counted values (?)", (key,))
        return cursor.rowcount == 1

    def under_way(self, key: str, attempt: int) -> bool:
        """Whether a batch that has not been read yet asks this."""
        row = self.connection.execute(
            "select 1 from asked where key = ? and attempt = ?", (key, attempt)
        ).fetchone()
        return row is not None

    def batches(self, asker: str) -> list[Batch]:
        """The batches under way of one asker, oldest first."""
        rows = self.connection.execute(
            "select token, asker, file, batch, expected_usd from batches where asker = ?"
            " order by at, token",
            (asker,),
        )
        return [Batch(*row) for row in rows]

    def asked_of(self, token: str) -> set[tuple[str, int]]:
        """(key, attempt) of every request of a batch under way."""
        rows = self.connection.execute("select key, attempt from asked where token = ?", (token,))
        return set(rows)

    def begin_batch(self, batch: Batch, asked: Sequence[tuple[str, int]]) -> None:
        """Write down a batch and its requests before anything is sent."""
        with self:
            self.connection.execute(
                "insert into batches (token, asker, file, batch, expected_usd)"
                " values (?, ?, ?, ?, ?)",
                astuple(batch),
            )
            self.connection.executemany(
                "insert into asked values (?, ?, ?)", ((batch.token, *pair) for pair in asked)
            )

    def note_batch(self, token: str, *, file: str, id: str) -> None:
        with self:
            self.connection.execute(
                "update batches set file = ?, batch = ? where token = ?", (file, id, token)
            )

    def end_batch(self, token: str, answers: Iterable[Answer]) -> None:
        """Keep a batch's answers and forget the batch; what it did not answer is free again."""
        with self:
            self._add(answers)
            self.connection.execute("delete from asked where token = ?", (token,))
            self.connection.execute("delete from batches where token = ?", (token,))
