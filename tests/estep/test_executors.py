"""Executors: several processes, or Ray, write the same bytes, and a worker that dies loses only the
shard that it was processing."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import tiny
from tests.estep.shard_barrier import at_barrier, complete_shards, open_barrier
from tests.estep.stage_harness import LatentsStage

# Every process imports torch and Ray, which takes minutes on a busy machine.
pytestmark = pytest.mark.timeout(1200)
SHARDS = 12
POLL_SECONDS = 0.01
RAY_START_FAILED = "The current node timed out during startup"


def output(stage: LatentsStage) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(stage.out.glob("*.parquet"))}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> dict[str, bytes]:
    """The output of an uninterrupted run in this process, with one thread."""
    stage = LatentsStage(tmp_path_factory.mktemp("expected"), base_folder, 1, SHARDS)
    stage.params["sampling"] |= {"threads": 1}
    stage.run()
    return output(stage)


@pytest.fixture(autouse=True)
def worker_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes can import the package and the tests."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tiny.ROOT / "src"), str(tiny.ROOT)]))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@contextlib.contextmanager
def stage_at_barrier(stage: LatentsStage) -> Iterator[subprocess.Popen[bytes]]:
    """The stage as a process of its own, whose workers wait at the barrier; it is killed at the
    end. Ray gives up if its node has not started after 30 s, which happens on a busy machine; the
    stage is then started again."""
    command = [sys.executable, "-m", "tests.estep.shard_barrier", *stage.arguments()]
    while True:
        with error_log(stage).open("wb") as stderr:
            process = subprocess.Popen(command, stderr=stderr, start_new_session=True)
        try:
            while process.poll() is None and not at_barrier(stage.folder / "work"):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
            if process.poll() is None:
                yield process
                return
        finally:
            process.kill()
            process.wait()
        text = error_log(stage).read_text("utf-8")
        assert RAY_START_FAILED in text, f"the stage ended before it reached the barrier: {text}"


def error_log(stage: LatentsStage) -> Path:
    return stage.folder / "stderr.txt"


def kill_children(process: subprocess.Popen[bytes], text: str) -> None:
    """SIGKILL the descendants whose command line or title contains `text`."""
    killed: list[int] = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if text in " ".join(child.cmdline()):
                child.kill()
                killed.append(child.pid)
    assert killed, f"no process '{text}' among the children of the stage"


def test_a_worker_process_that_dies_is_replaced(
    expected: dict[str, bytes], base_folder: Path, tmp_path: Path
) -> None:
    """One line says so; the shards that were finished are kept, and the bytes are those of a single
    process (docs/method.md, 4.4)."""
    stage = LatentsStage(tmp_path, base_folder, 1, SHARDS)
    stage.params["sampling"] |= {"workers": 2, "threads": 1}
    work = tmp_path / "work"
    with stage_at_barrier(stage) as process:
        saved = complete_shards(work)
        kill_children(process, "spawn_main")
        open_barrier(work)
        assert process.wait() == 0, error_log(stage).read_text("utf-8")
    text = error_log(stage).read_text("utf-8")
    assert text.count("the workers are started again") == 1
    assert "Traceback" not in text
    assert saved.items() <= complete_shards(work).items()
    assert output(stage) == expected


def test_a_ray_actor_that_dies_is_replaced(
    expected: dict[str, bytes], base_folder: Path, tmp_path: Path
) -> None:
    """The same run completes: Ray restarts the actor and repeats its shard."""
    stage = LatentsStage(tmp_path, base_folder, 1, SHARDS)
    stage.params["sampling"] |= {"executor": "ray", "workers": 1, "threads": 1}
    with stage_at_barrier(stage) as process:
        kill_children(process, "ray::Map")
        open_barrier(tmp_path / "work")
        assert process.wait() == 0, error_log(stage).read_text("utf-8")
    assert output(stage) == expected


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_killed_stage_resumes(
    executor: str, expected: dict[str, bytes], base_folder: Path, tmp_path: Path
) -> None:
    """After SIGKILL of the stage only unfinished shards are processed again, and the bytes are
    those of an uninterrupted run."""
    stage = LatentsStage(tmp_path, base_folder, 1, SHARDS)
    stage.params["sampling"] |= {"executor": executor, "threads": 1}
    work = tmp_path / "work"
    with stage_at_barrier(stage) as process:
        process.kill()
    saved = complete_shards(work)
    assert 2 <= len(saved) < SHARDS
    stage.params["sampling"] |= {"executor": "local"}
    stage.run()
    assert saved.items() <= complete_shards(work).items()
    assert output(stage) == expected
