"""The response cache: files of earlier versions can be read, and no file is ever replaced."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from boltlm.errors import UserError
from boltlm.teachers import cache_file
from boltlm.teachers.cache_transfer import check_cache
from boltlm.teachers.response_cache import PendingBatch, ResponseCache, TeacherResponse

# Tables as earlier versions created them; files with these tables exist.
EXISTING_FILE = """
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
pragma user_version = 1;
insert into answers values ('k', 0, '', 'length', 7, 64, 0.5, 'm', '', '2026-01-01 00:00:00');
insert into answers values ('k', 1, 'text', 'stop', 7, 8, 0.25, 'm', 'b', '2026-01-01 00:00:01');
insert into batches values ('token', 'teacher', 'file', 'id', 2.0, '2026-01-01 00:00:02');
insert into asked values ('token', 'k2', 3);
"""


def test_a_file_of_an_earlier_version_can_be_read_and_written(tmp_path: Path) -> None:
    """Responses that were paid for and pending batches are found in it."""
    path = tmp_path / "responses.sqlite"
    with sqlite3.connect(path) as db:
        db.executescript(EXISTING_FILE)
    cache = ResponseCache(path)
    assert cache.responses("k") == [
        TeacherResponse("k", 0, "", "length", 7, 64, 0.5, "m"),
        TeacherResponse("k", 1, "text", "stop", 7, 8, 0.25, "m", batch="b"),
    ]
    batch = PendingBatch("token", teacher="teacher", file="file", id="id", max_usd=2.0)
    assert cache.pending_batches("teacher") == [batch]
    assert cache.pending_batches("another teacher") == []
    assert cache.batch_requests("token") == {("k2", 3)}
    assert cache.is_in_batch("k2", 3)
    response = TeacherResponse("k2", 3, "text", "stop", 1, 2, 0.125, "m", batch="id")
    cache.complete_batch(batch, [response])
    assert cache.responses("k2") == [response]
    assert cache.pending_batches("teacher") == []
    assert not cache.is_in_batch("k2", 3)
    cache.close()


def test_earlier_versions_of_the_program_can_use_the_file(tmp_path: Path) -> None:
    """A new file and one of an earlier version get the same tables. What an earlier version of the
    program adds has no checksum, and is accepted and counted."""
    columns: list[list[tuple[str, str, str]]] = []
    for name in ("new", "existing"):
        path = tmp_path / f"{name}.sqlite"
        with sqlite3.connect(path) as db:
            if name == "existing":
                db.executescript(EXISTING_FILE)
        if name == "new":
            path.unlink()
        ResponseCache(path).close()
        with sqlite3.connect(path) as db:
            query = (
                "select m.name, c.name, c.type from sqlite_master m, pragma_table_info(m.name) c"
                " order by m.name, c.cid"
            )
            columns.append(db.execute(query).fetchall())
            assert db.execute("pragma user_version").fetchone() == (1,)
            db.execute(
                "insert or ignore into answers (key, attempt, text, finish, input_tokens,"
                " output_tokens, cost_usd, model, batch) values ('o', 0, 't', 'stop', 1, 2, 0.5,"
                " 'm', '')"
            )
            db.execute("insert into asked values ('token2', 'o', 1)")
        cache = ResponseCache(path)
        assert cache.responses("o") == [TeacherResponse("o", 0, "t", "stop", 1, 2, 0.5, "m")]
        assert cache.is_in_batch("o", 1)
        cache.close()
    assert columns[0] == columns[1]
    assert "3 responses of an earlier version have no checksum" in check_cache(path)


def test_an_interrupted_extension_of_a_file_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The columns and tables that a file of an earlier version lacks are added all at once."""
    path = tmp_path / "responses.sqlite"
    with sqlite3.connect(path) as db:
        db.executescript(EXISTING_FILE)
    additions = cache_file.ADDITIONS
    for number in range(len(additions)):
        monkeypatch.setattr(cache_file, "ADDITIONS", (*additions[:number], "an error"))
        with pytest.raises(UserError, match="cannot be opened"):
            ResponseCache(path)
    with sqlite3.connect(path) as db:
        assert db.execute("pragma table_info(totals)").fetchall() == []
    monkeypatch.setattr(cache_file, "ADDITIONS", additions)
    cache = ResponseCache(path)
    assert len(cache.responses("k")) == 2
    cache.close()


def test_a_saved_response_is_never_replaced(tmp_path: Path) -> None:
    """The first response to an attempt is the one that counts."""
    cache = ResponseCache(tmp_path / "responses.sqlite")
    first = TeacherResponse("k", 0, "first", "stop", 1, 2, 0.5, "m")
    cache.add([first])
    cache.add([TeacherResponse("k", 0, "second", "stop", 1, 2, 0.5, "m")])
    assert cache.responses("k") == [first]
    cache.close()


def test_a_file_that_cannot_be_read_is_never_replaced(tmp_path: Path) -> None:
    """It may hold responses that were paid for: the error says so, and the file stays as it is."""
    path = tmp_path / "responses.sqlite"
    path.write_bytes(b"not a database, but perhaps half of one" * 50)
    content = path.read_bytes()
    with pytest.raises(UserError, match="do not delete it"):
        ResponseCache(path)
    assert path.read_bytes() == content


def test_a_response_is_judged_once_over_a_connection(tmp_path: Path) -> None:
    """A run looks at each response in every pass; another run may have other checks."""
    path = tmp_path / "responses.sqlite"
    first = TeacherResponse("k", 0, "text", "stop", 7, 8, 0.25, "m")
    second = TeacherResponse("k", 1, "text", "stop", 7, 8, 0.25, "m")
    judged: list[TeacherResponse] = []

    def verdict(cache: ResponseCache, response: TeacherResponse, reason: str | None) -> str | None:
        return cache.verdict(response, lambda: judged.append(response) or reason)

    with closing(ResponseCache(path)) as cache:
        assert [verdict(cache, first, None), verdict(cache, second, "empty")] == [None, "empty"]
        assert [verdict(cache, first, "x"), verdict(cache, second, "x")] == [None, "empty"]
    assert judged == [first, second]
    with closing(ResponseCache(path)) as cache:
        assert verdict(cache, first, "too_long") == "too_long"
