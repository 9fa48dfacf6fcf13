"""The rows of the response cache: their checksums, and a scan that finds what is damaged."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from boltlm.fingerprint import fingerprint

# What a checksum covers. The names belong to the file format.
RESPONSE_COLUMNS = "key, attempt, text, finish, input_tokens, output_tokens, cost_usd, model, batch"

NO_TOTALS = "the table totals is empty"


def row_checksum(values: Sequence[object]) -> str | None:
    """The checksum of the RESPONSE_COLUMNS of a row; None where their types are impossible."""
    try:
        return fingerprint({"response": list(values)})
    except TypeError:
        return None


def read_totals(connection: sqlite3.Connection) -> tuple[int, int]:
    """The numbers of responses and of changes that a file itself counts."""
    row = connection.execute("select responses, changes from totals").fetchone()
    if row is None:
        raise sqlite3.DatabaseError(NO_TOTALS)
    return row


def find_faults(connection: sqlite3.Connection) -> str:
    """What SQLite finds wrong with the structure of a file; empty where it is intact. Tables with
    no checksums are compared with their indexes, which repeat all of their columns."""
    faults = [row for (row,) in connection.execute("pragma integrity_check(3)")]
    return "" if faults == ["ok"] else "; ".join(" ".join(fault.split()) for fault in faults)


@dataclass(slots=True)
class CacheReport:
    """What a scan of the responses has found. `without_checksum`: responses that were saved before
    there were checksums, whose content cannot be checked. `damaged`: responses whose content is not
    what was saved. `damage`: a description of all damage; empty where there is none."""

    responses: int = 0
    cost_usd: float = 0.0
    without_checksum: int = 0
    damaged: int = 0
    damage: str = ""


def scan_responses(connection: sqlite3.Connection) -> CacheReport:
    """Read all responses and compare them with their checksums, their order and their number.
    Raises sqlite3.DatabaseError where the file cannot be read."""
    report = CacheReport()
    disordered = False
    previous: tuple[str, int] | None = None
    connection.execute("begin")  # one snapshot, whatever other processes write meanwhile
    text_factory, connection.text_factory = connection.text_factory, bytes
    try:
        for row in connection.execute(f"select {RESPONSE_COLUMNS}, checksum from answers"):
            values = decode_row(row)
            report.responses += 1
            if values is None:
                report.damaged += 1
                continue
            report.cost_usd += values[6]
            report.without_checksum += row[-1] is None
            key = (values[0], values[1])
            disordered |= previous is not None and key <= previous
            previous = key
        num_responses, _ = read_totals(connection)
    finally:
        connection.text_factory = text_factory
        connection.execute("rollback")
    found: list[str] = []
    if report.damaged:
        found.append(f"{report.damaged:,} responses do not match their checksums")
    if disordered:
        found.append("the responses are not in order")
    if report.responses != num_responses:
        found.append(f"{report.responses:,} of {num_responses:,} responses are there")
    report.damage = "; ".join(found)
    return report


def decode_row(
    row: Sequence[object],
) -> tuple[str, int, str, str, int, int, float, str, str] | None:
    """The RESPONSE_COLUMNS of a row whose texts are bytes and whose last column is its checksum;
    None where they are not what was saved."""
    try:
        values = [value.decode() if isinstance(value, bytes) else value for value in row]
    except UnicodeDecodeError:
        return None
    *content, checksum = values
    types = (str, int, str, str, int, int, float, str, str)
    if not all(isinstance(value, kind) for value, kind in zip(content, types, strict=True)):
        return None
    if checksum is not None and checksum != row_checksum(content):
        return None
    return tuple(content)  # pyright: ignore[reportReturnType]
