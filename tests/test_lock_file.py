"""Files against dvc.lock, and DVC's copies against their names."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from boltlm.errors import UserError
from boltlm.lock_file import damaged_objects, locked_paths, path_problem


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of two files and a metrics file, as DVC hashes them."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "table" / "part").mkdir(parents=True)
    (folder / "table" / "b.txt").write_text("b")
    (folder / "table" / "part" / "a.txt").write_text("a")
    (folder / "table.txt").write_text("one")
    for command in (["init", "--no-scm", "-q"], ["add", "-q", "table", "table.txt"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], cwd=folder, check=True)
    files = [folder / "table.dvc", folder / "table.txt.dvc"]
    outs = [yaml.safe_load(file.read_text("utf-8"))["outs"][0] for file in files]
    (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": {"make": {"outs": outs}}}))
    return folder


def test_only_what_has_changed_is_wrong(repository: Path) -> None:
    """The hash of a folder is DVC's; one changed byte in the workspace, one in the cache, and a
    missing file are each found, and nothing else."""
    cache = repository / ".dvc" / "cache" / "files" / "md5"
    table, file = locked_paths(repository / "dvc.lock")
    assert (table.stage, str(table.path), str(file.path)) == ("make", "table", "table.txt")
    for locked in (table, file):
        assert path_problem(locked, repository) is None
        assert not list(damaged_objects(locked, cache))
    inside = repository / "table" / "part" / "a.txt"
    inside.chmod(0o644)
    inside.write_text("c")
    assert "is not what the stage make made" in str(path_problem(table, repository))
    assert path_problem(file, repository) is None
    (copy,) = (path for path in cache.rglob("*") if path.is_file() and path.read_bytes() == b"b")
    copy.chmod(0o644)
    copy.write_text("d")
    assert list(damaged_objects(table, cache)) == [copy]
    (repository / "table.txt").unlink()
    assert "is missing" in str(path_problem(file, repository))


def test_a_file_that_is_no_lock_file_is_an_error(tmp_path: Path) -> None:
    """Missing, or something else."""
    with pytest.raises(UserError, match="run dvc repro first"):
        locked_paths(tmp_path / "dvc.lock")
    for text in ("[]", "stages: {a: {outs: [1]}}", "a: ]"):
        (tmp_path / "dvc.lock").write_text(text)
        with pytest.raises(UserError, match="is not a lock file of DVC"):
            locked_paths(tmp_path / "dvc.lock")
