"""Damage to the response cache: it is noticed before anything is paid for again, and what can be
read is saved."""

import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from boltlm.errors import UserError
from boltlm.fingerprint import fingerprint
from boltlm.teachers import cache_file
from boltlm.teachers.cache_file import state_path
from boltlm.teachers.cache_transfer import check_cache, export_cache, import_cache
from boltlm.teachers.charges import Charge, add_charges
from boltlm.teachers.response_cache import PendingBatch, ResponseCache, TeacherResponse
from tests.teachers.stage_harness import ServerProcess, TeacherStage

NUM_RESPONSES = 500
BATCH = PendingBatch("token", "teacher", "file", "id", 2.0)
PAGE = 4096


def key(number: int) -> str:
    return fingerprint({"number": number})


def response(number: int) -> TeacherResponse:
    return TeacherResponse(key(number), 0, f"text {number} " * 20, "stop", 7, 8, 0.25, "m")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A cache with many pages and a pending batch, closed."""
    path = tmp_path / "cache" / "responses.sqlite"
    with closing(ResponseCache(path)) as cache:
        cache.add(map(response, range(NUM_RESPONSES)))
        cache.add_batch(BATCH, [("pending", 1)])
    return path


def flip(path: Path, offset: int, count: int = 1) -> None:
    content = bytearray(path.read_bytes())
    for place in range(offset, offset + count):
        content[place] ^= 0xFF
    path.write_bytes(content)


def test_an_intact_cache_is_summarised(path: Path) -> None:
    """The numbers of responses and batches and what they cost."""
    assert "intact; 500 responses for $125.0000, 1 pending batches" in check_cache(path)


def test_a_damaged_text_is_noticed_on_opening_and_never_used(path: Path) -> None:
    """One flipped byte in a text leaves the structure of the file intact; its checksum shows it."""
    offset = path.read_bytes().index(b"text 77 ")
    flip(path, offset + 5)
    with pytest.raises(UserError, match=r"1 responses do not match.*boltlm cache export"):
        ResponseCache(path)
    with pytest.raises(UserError, match="1 responses do not match"):
        check_cache(path)


def flip_unnoticed(path: Path, offset: int, bits: int) -> None:
    """As a disk does: the file's time of modification stays."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[offset] ^= bits
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("bits", "message"), [(1, f"attempt 0 of request {key(3)}"), (0x80, "Could not decode")]
)
def test_a_damaged_response_is_never_returned(bits: int, message: str, path: Path) -> None:
    """Also where nothing was noticed on opening. After that the whole file is distrusted."""
    flip_unnoticed(path, path.read_bytes().index(b"text 3 "), bits)
    with closing(ResponseCache(path)) as cache:
        assert cache.responses(key(4)) == [response(4)]
        with pytest.raises(UserError, match=f"{message}.*boltlm cache export"):
            cache.responses(key(3))
    with pytest.raises(UserError, match="1 responses do not match"):
        ResponseCache(path)


def test_the_command_finds_damage_that_opening_the_file_does_not_notice(path: Path) -> None:
    """From then on opening it reports the damage."""
    flip_unnoticed(path, path.read_bytes().index(b"text 3 "), 1)
    ResponseCache(path).close()
    for function in (check_cache, ResponseCache):
        with pytest.raises(UserError, match="1 responses do not match"):
            function(path)


def test_a_damaged_key_does_not_look_like_a_missing_response(path: Path) -> None:
    """A look-up would find nothing, and the request would be paid for again."""
    flip(path, path.read_bytes().index(key(5).encode()))
    with pytest.raises(UserError, match="damaged"):
        ResponseCache(path)


@pytest.mark.parametrize("page", range(12))
def test_a_damaged_page_is_noticed_and_the_others_are_saved(page: int, path: Path) -> None:
    """Wherever it is in the file, also at its beginning. The export, added to a new cache, holds
    all responses but those of the damaged page."""
    flip(path, page * PAGE, PAGE)
    with pytest.raises(UserError, match=r"damaged.*boltlm cache export"):
        ResponseCache(path).close()
    out = path.with_name("salvage.jsonl")
    export_cache(path, out)
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    saved = {line["key"] for line in lines if "key" in line}
    assert saved <= {key(number) for number in range(NUM_RESPONSES)}
    assert len(saved) >= NUM_RESPONSES - 20
    shutil.move(path, path.with_name("damaged"))
    assert f"{len(saved):,} responses added" in import_cache(path, out)
    assert f"intact; {len(saved):,} responses" in check_cache(path)
    with closing(ResponseCache(path)) as cache:
        for number in range(NUM_RESPONSES):
            expected = [response(number)] if key(number) in saved else []
            assert cache.responses(key(number)) == expected


@pytest.mark.parametrize("content", [b"pending", b"teacher", b"killed"])
def test_damage_to_batches_and_charges_is_noticed(content: bytes, path: Path) -> None:
    """One flipped byte in the key of a request in a batch, in a batch or in a charge: in the table,
    or in the index that repeats it."""
    with closing(ResponseCache(path)) as cache:
        add_charges(cache, [Charge("t", "killed", 1.5, estimated=True)])
    intact = path.read_bytes()
    places = [match.start() for match in re.finditer(content, intact)]
    assert len(places) >= 2
    for place in places:
        path.write_bytes(intact)
        flip(path, place)
        with pytest.raises(UserError, match=r"damaged.*boltlm cache export"):
            ResponseCache(path)


def test_a_truncated_file_is_noticed_and_its_rest_is_saved(path: Path) -> None:
    """Half of the pages are left, in no order of their keys."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 // PAGE * PAGE])
    with pytest.raises(UserError, match="damaged"):
        ResponseCache(path)
    text = export_cache(path, path.with_name("salvage.jsonl"))
    assert "a part of the file cannot be read" in text
    num_lines = len(path.with_name("salvage.jsonl").read_text("utf-8").splitlines())
    assert num_lines > NUM_RESPONSES // 4


def test_an_empty_or_missing_file_is_not_a_new_cache(path: Path) -> None:
    """Where responses were saved, neither is replaced by an empty cache."""
    path.write_bytes(b"")
    with pytest.raises(UserError, match="empty file"):
        ResponseCache(path)
    path.unlink()
    with pytest.raises(UserError, match="is missing, but 500 responses were saved"):
        ResponseCache(path)
    assert not path.exists()
    state_path(path).unlink()
    with closing(ResponseCache(path)) as cache:
        assert cache.responses(key(0)) == []


def test_a_missing_wal_file_is_noticed(tmp_path: Path) -> None:
    """It holds what a killed process has saved. Without it, responses and batches would be lost
    without a trace."""
    path, copy = tmp_path / "responses.sqlite", tmp_path / "copy.sqlite"
    ResponseCache(path).close()
    with closing(ResponseCache(path)) as cache:
        cache.add_batch(BATCH, [("pending", 1)])
        for suffix in ("", "-wal", ".state"):  # as a killed process leaves them
            shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
    wal = copy.with_name("copy.sqlite-wal")
    moved = wal.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"copy\.sqlite-wal is missing"):
        ResponseCache(copy)
    moved.rename(wal)
    with closing(ResponseCache(copy)) as cache:
        assert cache.pending_batches("teacher") == [BATCH]


def test_an_older_copy_is_not_used_silently(path: Path) -> None:
    """A backup that was restored lacks responses that were paid for since."""
    copy = path.with_name("backup")
    shutil.copyfile(path, copy)
    with closing(ResponseCache(path)) as cache:
        cache.add([response(NUM_RESPONSES)])
    shutil.copyfile(copy, path)
    with pytest.raises(UserError, match="holds 500 responses, but 501 were saved"):
        ResponseCache(path)
    state_path(path).unlink()
    with closing(ResponseCache(path)) as cache:
        assert cache.responses(key(0)) == [response(0)]


def test_a_cache_that_was_closed_is_not_read_on_opening(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a large file takes minutes; it is read only where a process was killed or something
    else has changed it, and not where it is very large."""

    def refuse(connection: sqlite3.Connection) -> None:
        raise AssertionError(connection)

    monkeypatch.setattr(cache_file, "scan_responses", refuse)
    ResponseCache(path).close()
    with closing(ResponseCache(path)) as cache:
        cache.add([response(NUM_RESPONSES)])
    ResponseCache(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("delete from answers where key = ?", (key(0),))
        db.commit()
    with pytest.raises(AssertionError):
        ResponseCache(path)
    monkeypatch.setattr(cache_file, "MAX_BYTES_CHECKED_ON_OPENING", 1000)
    for _ in range(2):
        with closing(ResponseCache(path)) as cache:
            assert not cache.verified
    check_cache(path)
    with closing(ResponseCache(path)) as cache:
        assert cache.verified


def test_an_import_adds_what_is_missing_and_keeps_what_is_there(path: Path) -> None:
    """From an export and from a copy of a cache alike; pending batches come along once."""
    export = path.with_name("export.jsonl")
    assert "500 responses and 1 pending batches" in export_cache(path, export)
    with pytest.raises(UserError, match="exists"):
        export_cache(path, export)
    for source in (export, path):
        target = path.with_name(f"target-{source.suffix}.sqlite")
        other = TeacherResponse(key(1), 0, "other", "stop", 1, 2, 0.5, "m")
        with closing(ResponseCache(target)) as cache:
            cache.add([response(0), other])
        text = import_cache(target, source)
        assert "498 responses added, 500 in all" in text
        assert "1 differ" in text
        assert "0 responses added" in import_cache(target, source)
        with closing(ResponseCache(target)) as cache:
            assert cache.responses(key(1)) == [other]
            assert cache.responses(key(2)) == [response(2)]
            assert cache.pending_batches("teacher") == [BATCH]
            assert cache.batch_requests("token") == {("pending", 1)}


def test_an_import_leaves_out_damaged_lines(path: Path) -> None:
    """A changed line does not match its checksum, and another file is refused."""
    export = path.with_name("export.jsonl")
    export_cache(path, export)
    export.write_text(export.read_text("utf-8").replace("text 77 ", "text 78 ", 1))
    text = import_cache(path.with_name("target.sqlite"), export)
    assert "499 responses added" in text
    assert "1 damaged ones are left out" in text
    with pytest.raises(UserError, match="neither a response cache nor an export"):
        import_cache(path, Path(__file__))


def test_a_stage_with_a_damaged_cache_sends_nothing(
    make_stage: Callable[..., TeacherStage], server: ServerProcess
) -> None:
    """It ends with one line that names the command."""
    stage = make_stage().configure("openai", server)
    stage.run_in_process()
    answered = server.answered()
    cache = stage.paths["cache"]
    flip(cache, cache.read_bytes().index(b"The passage rests"))
    exit_code, printed = stage.run()
    assert exit_code == 1
    assert "Traceback" not in printed
    assert f"boltlm cache export salvage.jsonl --cache {cache}" in printed
    assert server.answered() == answered
