"""What the response cache knows of requests without a response: what they may have cost, and which
of them were given up.

One table, `charges`, in the file of the response cache. It is created when it is first needed, so
files of other versions can be read.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass

from boltlm.teachers.response_cache import ResponseCache

_SCHEMA = (
    """create table if not exists charges (
    key text, reason text, usd real, estimated integer, message text,
    at text default current_timestamp)""",
    # Repeats the rows, so that a check of the file notices damage to them.
    """create index if not exists charges_copy on charges (
    key, reason, usd, estimated, message)""",
)
# Reasons. Of the first three the server may have charged for an answer that was not received.
TIMEOUT, CONNECTION, KILLED = "timeout", "connection", "killed"
MALFORMED, PROBE = "malformed", "probe"
LOST, FORGOTTEN = "lost", "forgotten"  # results that a batch does not hold; a batch given up
IN_FLIGHT = "in_flight"  # the sum of what a running process has in flight, by its teacher
GIVEN_UP = "given_up"  # no charge: the server never answered this request, but others


@dataclass(frozen=True, slots=True)
class Charge:
    """A row of the table. `key`: of the request, or the fingerprint of the teacher. `estimated`:
    the server did not report the usage, and `usd` is the most that the request can have cost."""

    key: str
    reason: str
    usd: float
    estimated: bool
    message: str = ""


def add_charges(cache: ResponseCache, charges: Iterable[Charge]) -> None:
    """Save charges. Raises UserError where the file cannot be written."""
    with cache:
        _insert(cache, charges)


def record_in_flight(cache: ResponseCache, teacher: str, usd: float) -> None:
    """Save the most that the requests in flight can cost, before they are sent. 0: there are none.
    If the process is killed, the next one counts this amount."""
    with cache:
        _create_table(cache)
        cache.connection.execute(
            "delete from charges where key = ? and reason = ?", (teacher, IN_FLIGHT)
        )
        if usd:
            _insert(cache, [Charge(teacher, IN_FLIGHT, usd, estimated=True)])


def adopt_in_flight(cache: ResponseCache, teacher: str) -> None:
    """Count what was in flight when an earlier run of a teacher was killed."""
    if _has_table(cache.connection):
        with cache:
            cache.connection.execute(
                "update charges set reason = ? where key = ? and reason = ?",
                (KILLED, teacher, IN_FLIGHT),
            )


def read_charges(cache: ResponseCache) -> dict[str, list[Charge]]:
    """All charges by their key."""
    charges: dict[str, list[Charge]] = {}
    for charge in select_charges(cache.connection):
        charges.setdefault(charge.key, []).append(charge)
    return charges


def select_charges(connection: sqlite3.Connection) -> list[Charge]:
    """All charges in the file of a cache. Raises sqlite3.DatabaseError where it cannot be read."""
    if not _has_table(connection):
        return []
    query = "select key, reason, usd, estimated, message from charges"
    return [
        Charge(key, reason, usd, bool(estimated), message)
        for key, reason, usd, estimated, message in connection.execute(query)
    ]


def merge_charges(cache: ResponseCache, charges: Iterable[Charge]) -> None:
    """Save the charges of another cache, without those that are here already."""
    saved = Counter(charge for group in read_charges(cache).values() for charge in group)
    new = list((Counter(charges) - saved).elements())
    if new:
        add_charges(cache, new)


def _insert(cache: ResponseCache, charges: Iterable[Charge]) -> None:
    _create_table(cache)
    cache.connection.executemany(
        "insert into charges (key, reason, usd, estimated, message) values (?, ?, ?, ?, ?)",
        (astuple(charge) for charge in charges),
    )


def _create_table(cache: ResponseCache) -> None:
    for statement in _SCHEMA:
        cache.connection.execute(statement)


def _has_table(connection: sqlite3.Connection) -> bool:
    query = "select 1 from sqlite_master where name = 'charges'"
    return connection.execute(query).fetchone() is not None
