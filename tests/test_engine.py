"""Shards of work: kept when a run dies, made again when damaged, published whole."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from boltlm import engine

NAMES = [f"{index:05d}.parquet" for index in range(5)]


class Work:
    """A computation that writes its shard's name, and remembers what it was asked for."""

    def __init__(self, fail_at: str | None = None) -> None:
        self.asked: list[str] = []
        self.fail_at = fail_at

    def __call__(self, name: str, path: Path) -> None:
        self.asked.append(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == self.fail_at:
            path.write_text("half", encoding="utf-8")
            raise RuntimeError("killed")
        path.write_text(f"content of {name}", encoding="utf-8")


def run(
    tmp_path: Path, compute: Callable[[str, Path], None], names: list[str] = NAMES
) -> list[str]:
    work = tmp_path / "work"

    def make(left: list[str]) -> Iterator[str]:
        for name in left:
            compute(name, work / name)
            engine.seal(work / name)
            yield name

    return engine.run_shards(names, make, work=work, out=tmp_path / "out", what="tests")


def published(tmp_path: Path) -> dict[str, str]:
    return {path.name: path.read_text("utf-8") for path in (tmp_path / "out").iterdir()}


WHOLE = {name: f"content of {name}" for name in NAMES}


def test_all_shards_are_made_and_published(tmp_path: Path) -> None:
    """In order, each once, and nothing else in the output."""
    work = Work()
    assert run(tmp_path, work) == NAMES
    assert work.asked == NAMES
    assert published(tmp_path) == WHOLE


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """Hours of sampling must outlive a crash: what is finished is kept, the shard that died
    half-way is made again."""
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, Work(fail_at=NAMES[3]))
    assert not (tmp_path / "out").exists()
    again = Work()
    assert run(tmp_path, again) == NAMES[3:]
    assert again.asked == NAMES[3:]
    assert published(tmp_path) == WHOLE


def test_a_finished_run_makes_nothing_again(tmp_path: Path) -> None:
    """DVC deletes the output before a stage runs; the work folder gives it back."""
    run(tmp_path, Work())
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    work = Work()
    assert run(tmp_path, work) == []
    assert work.asked == []
    assert published(tmp_path) == WHOLE


@pytest.mark.parametrize(
    "damage", ["truncated", "changed", "emptied", "gone", "seal gone", "seal cut"]
)
def test_a_damaged_shard_is_made_again(tmp_path: Path, damage: str) -> None:
    """A disk that filled up leaves files that look finished; only those are made again."""
    run(tmp_path, Work())
    shard = tmp_path / "work" / NAMES[2]
    seal = shard.with_name(shard.name + ".sha256")
    text = shard.read_text("utf-8")
    if damage == "gone":
        shard.unlink()
    elif damage == "seal gone":
        seal.unlink()
    elif damage == "seal cut":
        seal.write_text(seal.read_text("utf-8")[:20], encoding="utf-8")
    else:
        changed = {"truncated": text[:-1], "changed": text.upper(), "emptied": ""}[damage]
        shard.write_text(changed, encoding="utf-8")
    work = Work()
    assert run(tmp_path, work) == [NAMES[2]]
    assert work.asked == [NAMES[2]]
    assert published(tmp_path) == WHOLE


def test_publishing_leaves_nothing_stale(tmp_path: Path) -> None:
    """A corpus that shrank must not keep the shards of the longer one."""
    run(tmp_path, Work())
    (tmp_path / "out" / "notes.txt").write_text("old", encoding="utf-8")
    (tmp_path / "out" / "folder").mkdir()
    run(tmp_path, Work(), NAMES[:2])
    assert published(tmp_path) == {name: WHOLE[name] for name in NAMES[:2]}


def test_published_shards_are_copies(tmp_path: Path) -> None:
    """DVC may turn an output into a link or make it read-only; the work must not change with it."""
    run(tmp_path, Work())
    (tmp_path / "out" / NAMES[0]).write_text("edited", encoding="utf-8")
    assert run(tmp_path, Work()) == []
    assert published(tmp_path) == WHOLE


def test_the_work_folder_follows_dvc_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A queued experiment runs in a copy of the repository; its work must be found by others."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert engine.work_root(Path(".work")) == tmp_path / ".work"
    monkeypatch.delenv("DVC_ROOT")
    assert engine.work_root(Path(".work")).resolve() == Path.cwd() / ".work"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert engine.work_root(Path("/elsewhere/work")) == Path("/elsewhere/work")


def test_keys_name_what_work_depends_on() -> None:
    """The order of facts does not count, every value does."""
    facts = {"model": "abc", "seed": 1, "sampling": {"batch_tokens": 4}}
    key = engine.key(facts)
    assert engine.key(dict(reversed(facts.items()))) == key
    others = [
        {**facts, "model": "abd"},
        {**facts, "seed": 2},
        {**facts, "seed": "1"},
        {**facts, "sampling": {"batch_tokens": 5}},
        {**facts, "more": None},
    ]
    assert len({key, *map(engine.key, others)}) == 6
    assert key.isalnum()


def test_work_is_known_by_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards drawn by other code are other shards; a comment is not other code."""
    package = tmp_path / "worker_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "draws.py").write_text("def log_w(p, q):\n    return p - q\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = engine.code(["worker_package"])
    (package / "draws.py").write_text("# why\ndef log_w(p, q):\n\n    return (p - q)\n")
    assert engine.code(["worker_package"]) == before
    (package / "draws.py").write_text("def log_w(p, q):\n    return q - p\n")
    assert engine.code(["worker_package"]) != before
    assert engine.code(["worker_package.draws"]) != engine.code(["worker_package"])
