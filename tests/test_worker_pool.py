"""A pool of worker processes: every item once, whatever dies; errors and limits."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from boltlm.errors import UserError
from boltlm.worker_pool import process_items


class Worker:
    """Doubles numbers. It dies with SIGKILL at the numbers of `fatal` for which there is no file in
    `folder`, and writes that file first."""

    def __init__(self, folder: Path, fatal: tuple[int, ...] = ()) -> None:
        self.folder, self.fatal = folder, fatal
        (folder / f"worker-{os.getpid()}").touch()

    def __call__(self, number: int) -> int:
        path = self.folder / str(number)
        if number in self.fatal and not path.exists():
            path.touch()
            os.kill(os.getpid(), 9)
        if number < 0:
            raise UserError(f"{number} is negative")
        return 2 * number


def kill_always(_: int) -> int:
    os.kill(os.getpid(), 9)
    return 0


def create_killer() -> Callable[[int], int]:
    return kill_always


def test_workers_are_kept_and_items_are_taken_as_needed(tmp_path: Path) -> None:
    """A worker loads a model; an item may be large, so only a few are in memory."""
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    results = process_items([partial(Worker, tmp_path)] * 2, items(), what="tests")
    first = next(results)
    assert len(taken) <= 6
    assert sorted([first, *results]) == [2 * number for number in range(20)]
    assert len(list(tmp_path.glob("worker-*"))) <= 2


def test_a_worker_that_dies_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each item has one result, also those that were in work or waiting when it died."""
    create = partial(Worker, tmp_path, (3, 11))
    assert sorted(process_items([create] * 2, range(14), what="tests")) == list(range(0, 28, 2))
    assert "tests: a worker process died" in capsys.readouterr().err


def test_workers_that_always_die_are_an_error() -> None:
    """In one line that says how to go on."""
    with pytest.raises(UserError, match=r"tests: a worker process died .* run again to resume"):
        list(process_items([create_killer], [1], what="tests"))


def test_an_error_of_a_worker_is_raised_here(tmp_path: Path) -> None:
    """As it would be without processes."""
    with pytest.raises(UserError, match="-1 is negative"):
        list(process_items([partial(Worker, tmp_path)], [1, -1], what="tests"))
