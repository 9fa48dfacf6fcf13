"""Several processes, or Ray: the same bytes, and only unfinished shards are lost with a worker."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from boltlm.errors import UserError
from tests import tiny
from tests.sampling.test_shards import Stage

# Ray's own deprecations, which it tells each time it is started.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PROBLEM_SECONDS, SHARDS = 120.0, 60


def output(stage: Stage) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((stage.folder / "out").iterdir())}


def made(stage: Stage) -> dict[str, int]:
    """When each finished shard was sealed, by name."""
    seals = (stage.folder / "work").rglob("*.sha256")
    return {path.name: path.stat().st_mtime_ns for path in seals}


def sealed(stage: Stage) -> set[str]:
    return set(made(stage))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Stage:
    """All shards, made in this process."""
    stage = Stage(tmp_path_factory.mktemp("alone"), base_folder, 1, SHARDS)
    stage.params["sampling"] |= {"threads": 1}
    stage.run()
    return stage


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes find the package and the tests."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tiny.ROOT / "src"), str(tiny.ROOT)]))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def test_a_worker_process_that_dies_costs_its_shard_only(
    alone: Stage, base_folder: Path, tmp_path: Path
) -> None:
    """It is said in a line; the next run makes what is left, and the bytes are those of one
    process (SPEC 4: a shard's result does not depend on how many workers there are)."""
    stage = Stage(tmp_path, base_folder, 1, SHARDS)
    stage.params["sampling"] |= {"workers": 2, "threads": 1}
    with (
        killing(lambda: workers("spawn_main"), when=lambda: len(sealed(stage)) >= 2),
        pytest.raises(UserError, match="a worker process died"),
    ):
        stage.run()
    kept = sealed(stage)
    assert 2 <= len(kept) < SHARDS
    stage.run()
    assert output(stage) == output(alone)


def test_a_ray_actor_that_dies_is_replaced(alone: Stage, base_folder: Path, tmp_path: Path) -> None:
    """The run goes on by itself: the actor comes again, and makes its shard again."""
    stage = Stage(tmp_path, base_folder, 1, SHARDS)
    stage.params["sampling"] |= {"engine": "ray", "workers": 1, "threads": 1}
    with killing(lambda: workers("ray::Map"), when=lambda: len(sealed(stage)) >= 2) as killed:
        stage.run()
    assert killed, "no actor was killed"
    assert output(stage) == output(alone)


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_the_driver_is_killed_and_runs_again(
    engine: str, alone: Stage, base_folder: Path, tmp_path: Path
) -> None:
    """SIGKILL of the stage: only unfinished shards are made again, the bytes are those of an
    undisturbed run."""
    stage = Stage(tmp_path, base_folder, 1, SHARDS)
    stage.params["sampling"] |= {"engine": engine, "threads": 1}
    process = subprocess.Popen(stage.command(), start_new_session=True)
    until = time.monotonic() + PROBLEM_SECONDS
    while len(sealed(stage)) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    process.kill()
    process.wait()
    kept = made(stage)
    assert 2 <= len(kept) < SHARDS
    stage.params["sampling"] |= {"engine": "local"}
    stage.run()
    assert kept.items() <= made(stage).items()
    assert output(stage) == output(alone)


@contextlib.contextmanager
def killing(
    who: Callable[[], list[psutil.Process]], *, when: Callable[[], bool]
) -> Iterator[list[int]]:
    """Meanwhile, once `when` holds, SIGKILL the processes of `who` that are there."""
    killed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not when() or not who():
            if over.wait(0.005):
                return
        for process in who():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def workers(text: str) -> list[psutil.Process]:
    """Children of this process whose command line or title holds `text`."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children(recursive=True):
        try:
            if text in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found
