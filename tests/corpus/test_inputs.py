"""Local files that the experiment reads are named in `inputs`, and described for DVC."""

from pathlib import Path

import pytest

from boltlm.corpus.inputs import describe_input, require_input
from boltlm.errors import UserError


def test_the_description_changes_with_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "a.jsonl").write_text("one")
    (folder / "more" / "b.jsonl").write_text("three")
    first = describe_input(folder)
    assert (first["files"], first["bytes"]) == (2, 8)
    assert describe_input(folder) == first
    (folder / "a.jsonl").write_text("two")
    second = describe_input(folder)
    assert (second["files"], second["bytes"]) == (2, 8)
    (folder / "a.jsonl").rename(folder / "c.jsonl")
    assert len({first["digest"], second["digest"], describe_input(folder)["digest"]}) == 3
    assert describe_input(folder / "c.jsonl")["files"] == 1


def test_an_input_that_does_not_exist_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing does not exist or has no files"):
        describe_input(tmp_path / "nothing")


@pytest.mark.parametrize("path", ["books/a.jsonl", "books/*.jsonl.gz", "books", "{cwd}/books/b"])
def test_files_inside_an_input_are_accepted(path: str) -> None:
    require_input("corpus.path", path.format(cwd=Path.cwd()), {"other": "x", "books": "books"})


@pytest.mark.parametrize("path", ["book/a.jsonl", "books2/a.jsonl", "/books/a.jsonl"])
def test_other_files_are_refused_by_their_key(path: str) -> None:
    with pytest.raises(UserError, match=rf"corpus\.path: '{path}' is not among `inputs`"):
        require_input("corpus.path", path, {"books": "books"})
