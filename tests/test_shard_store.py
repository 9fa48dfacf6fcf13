"""Shards: saved when a run dies, made again when damaged, published completely."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from boltlm.shard_store import exclusive_lock, mark_complete, repository_path, run_shards

NAMES = [f"{index:05d}.parquet" for index in range(5)]


class Work:
    """A computation that writes its shard's name and records which shards it was called for."""

    def __init__(self, fail_at: str | None = None) -> None:
        self.calls: list[str] = []
        self.fail_at = fail_at

    def __call__(self, name: str, path: Path) -> None:
        self.calls.append(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == self.fail_at:
            path.write_text("half", encoding="utf-8")
            raise RuntimeError("killed")
        path.write_text(f"content of {name}", encoding="utf-8")


def run(
    tmp_path: Path, compute: Callable[[str, Path], None], names: list[str] = NAMES
) -> list[str]:
    work = tmp_path / "work"

    def process(missing: list[str]) -> Iterator[str]:
        for name in missing:
            compute(name, work / name)
            mark_complete(work / name)
            yield name

    return run_shards(names, process, work=work, out=tmp_path / "out", what="tests")


def published(tmp_path: Path) -> dict[str, str]:
    return {path.name: path.read_text("utf-8") for path in (tmp_path / "out").iterdir()}


COMPLETE = {name: f"content of {name}" for name in NAMES}


def test_all_shards_are_made_and_published(tmp_path: Path) -> None:
    """In order, each once, and nothing else in the output."""
    work = Work()
    assert run(tmp_path, work) == NAMES
    assert work.calls == NAMES
    assert published(tmp_path) == COMPLETE


def test_an_interrupted_run_resumes(tmp_path: Path) -> None:
    """Hours of sampling must outlive a crash: finished shards are used, the one that was being
    written is made again."""
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, Work(fail_at=NAMES[3]))
    assert not (tmp_path / "out").exists()
    again = Work()
    assert run(tmp_path, again) == NAMES[3:]
    assert again.calls == NAMES[3:]
    assert published(tmp_path) == COMPLETE


def test_published_shards_take_no_further_space(tmp_path: Path) -> None:
    """A shard of the output is the same file as that of the work folder."""
    run(tmp_path, Work())
    for name in NAMES:
        assert (tmp_path / "out" / name).samefile(tmp_path / "work" / name)


def test_shards_are_copied_where_links_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work folder and output may be on different file systems."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    run(tmp_path, Work())
    assert published(tmp_path) == COMPLETE
    assert not (tmp_path / "out" / NAMES[0]).samefile(tmp_path / "work" / NAMES[0])


def test_a_finished_run_repeats_nothing(tmp_path: Path) -> None:
    """DVC deletes the output before a stage runs; it is restored from the work folder."""
    run(tmp_path, Work())
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    work = Work()
    assert run(tmp_path, work) == []
    assert work.calls == []
    assert published(tmp_path) == COMPLETE


@pytest.mark.parametrize(
    "damage", ["truncated", "changed", "emptied", "gone", "no checksum", "short checksum"]
)
def test_a_damaged_shard_is_made_again(tmp_path: Path, damage: str) -> None:
    """A full disk leaves files that look finished; only those are made again."""
    run(tmp_path, Work())
    shard = tmp_path / "work" / NAMES[2]
    checksum = shard.with_name(shard.name + ".sha256")
    text = shard.read_text("utf-8")
    if damage == "gone":
        shard.unlink()
    elif damage == "no checksum":
        checksum.unlink()
    elif damage == "short checksum":
        checksum.write_text(checksum.read_text("utf-8")[:20], encoding="utf-8")
    else:
        changed = {"truncated": text[:-1], "changed": text.upper(), "emptied": ""}[damage]
        shard.write_text(changed, encoding="utf-8")
    work = Work()
    assert run(tmp_path, work) == [NAMES[2]]
    assert work.calls == [NAMES[2]]
    assert published(tmp_path) == COMPLETE


def test_publishing_leaves_nothing_stale(tmp_path: Path) -> None:
    """A corpus that shrank must not keep the shards of the longer one."""
    run(tmp_path, Work())
    (tmp_path / "out" / "notes.txt").write_text("old", encoding="utf-8")
    (tmp_path / "out" / "folder").mkdir()
    run(tmp_path, Work(), NAMES[:2])
    assert published(tmp_path) == {name: COMPLETE[name] for name in NAMES[:2]}


def test_an_edit_of_the_output_is_noticed(tmp_path: Path) -> None:
    """The output may be the same file as the finished work; what was edited is made again."""
    run(tmp_path, Work())
    (tmp_path / "out" / NAMES[0]).write_text("edited", encoding="utf-8")
    assert run(tmp_path, Work()) == NAMES[:1]
    assert published(tmp_path) == COMPLETE


def test_shared_paths_follow_dvc_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A queued experiment runs in a copy of the repository and must share unfinished work."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert repository_path(Path(".work")) == tmp_path / ".work"
    monkeypatch.delenv("DVC_ROOT")
    assert repository_path(Path(".work")).resolve() == Path.cwd() / ".work"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert repository_path(Path("/elsewhere/work")) == Path("/elsewhere/work")


def test_work_of_another_process_is_declined(tmp_path: Path) -> None:
    """Without waiting; and it is held here when the other has ended."""
    with exclusive_lock(tmp_path / "work", "one") as held:
        assert held
        with exclusive_lock(tmp_path / "work", "two", wait=False) as held_too:
            assert not held_too
        with exclusive_lock(tmp_path / "other", "two", wait=False) as held_too:
            assert held_too
    with exclusive_lock(tmp_path / "work", "two", wait=False) as held:
        assert held
