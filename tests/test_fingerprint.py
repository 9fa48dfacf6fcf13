"""Work is known by its facts, its files and the code that does it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from boltlm import fingerprint as module
from boltlm.fingerprint import fingerprint, hash_code, hash_path, import_closure, imported_modules


def test_every_fact_counts_and_their_order_does_not() -> None:
    """Facts come from dictionaries, whose order says nothing."""
    facts = {"model": "abc", "seed": 1, "sampling": {"batch_tokens": 4}}
    expected = fingerprint(facts)
    assert fingerprint(dict(reversed(facts.items()))) == expected
    others = [
        {**facts, "model": "abd"},
        {**facts, "seed": 2},
        {**facts, "seed": "1"},
        {**facts, "sampling": {"batch_tokens": 5}},
        {**facts, "more": None},
    ]
    assert len({expected, *map(fingerprint, others)}) == 6


def test_a_folder_is_known_by_its_files_and_their_names(tmp_path: Path) -> None:
    """Where the folder lies does not count; a changed, renamed or further file does."""
    digests: set[str] = set()
    for number, files in enumerate(
        ({"a": "1", "b/c": "2"}, {"a": "1", "b/d": "2"}, {"a": "2", "b/c": "2"}, {"a": "1"})
    ):
        for copy in ("one", "two"):
            for name, text in files.items():
                path = tmp_path / f"{number}{copy}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        first, second = (hash_path(tmp_path / f"{number}{copy}") for copy in ("one", "two"))
        assert first == second
        digests.add(first)
    assert len(digests) == 4


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `boltlm` of its own: worker imports weights, weights imports records in a function,
    and all of them import the neutral module `progress`, which imports `timing`."""
    root = tmp_path / "boltlm"
    (root / "estep").mkdir(parents=True)
    files = {
        "estep/worker.py": "from boltlm.estep import weights\nimport boltlm.progress\n",
        "estep/weights.py": "from boltlm.progress import bar\ndef f():\n"
        "    from boltlm.records import read\n    return read() - 1\n",
        "records.py": "def read():\n    return 1\n",
        "progress.py": "from boltlm.unrelated import x\n",
        "unrelated.py": "x = 1\n",
    }
    for name, text in files.items():
        (root / name).write_text(text)
    monkeypatch.setattr(module, "_package_parent", lambda: tmp_path)
    forget()
    yield root
    forget()


def forget() -> None:
    module._syntax_tree.cache_clear()
    hash_code.cache_clear()


def test_the_closure_follows_imports_but_not_neutral_modules(package: Path) -> None:
    """Imports inside functions count; what only a neutral module imports does not."""
    assert imported_modules(package / "estep" / "worker.py") == {
        "boltlm.estep.weights",
        "boltlm.progress",
    }
    closure = import_closure("boltlm.estep.worker")
    assert closure == {"boltlm.estep.worker", "boltlm.estep.weights", "boltlm.records"}


@pytest.mark.parametrize(
    ("file", "old", "new", "counts"),
    [
        ("records.py", "return 1", "return 2", True),
        ("estep/weights.py", "- 1", "+ 1", True),
        ("records.py", "    return 1", "    # why\n\n    return (1)", False),
        ("progress.py", "x\n", "x as y\n", False),
        ("unrelated.py", "x = 1", "x = 2", False),
    ],
)
def test_work_is_known_by_the_code_that_does_it(
    package: Path, file: str, old: str, new: str, counts: bool
) -> None:
    """A change anywhere in the closure makes older work unknown; a comment, a line break, or an
    edit of a neutral module does not."""
    before = hash_code("boltlm.estep.worker")
    path = package / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    forget()
    assert (hash_code("boltlm.estep.worker") != before) == counts
