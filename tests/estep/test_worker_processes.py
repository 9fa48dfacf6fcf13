"""Processes that share tasks: what each gets, errors, and tasks that another process is doing."""

import os
import re
import time
from pathlib import Path

import pytest
import torch

from boltlm.errors import UserError
from boltlm.estep.worker_processes import Workers, assign_gpus, run_tasks, threads_per_worker

KEY = "sampling.workers"
TWO = Workers(count=2, gpus_per_worker=1, threads=3, isolated=True, key=KEY)
ALONE = Workers(count=1, gpus_per_worker=1, threads=None, isolated=False, key=KEY)
TWO_ON_CPU = Workers(count=2, gpus_per_worker=0, threads=1, isolated=True, key=KEY)
POLL_SECONDS = 0.01


def describe_process(task: Path, wait: bool) -> bool:
    """Write what the process of a task has."""
    gpus = os.environ["CUDA_VISIBLE_DEVICES"]
    task.write_text(f"{os.getpid()} {gpus} {torch.get_num_threads()} {wait}")
    return True


def test_each_task_has_a_process_with_gpus_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tasks of two workers: three processes, none of them this one, on two GPUs of those that
    this process may use."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    tasks = {name: tmp_path / name for name in "abc"}
    assert sorted(run_tasks(describe_process, tasks, TWO)) == ["a", "b", "c"]
    written = [path.read_text().split() for path in tasks.values()]
    assert len({process for process, *_ in written} - {str(os.getpid())}) == 3
    assert {gpu for _, gpu, *_ in written} <= {"4", "5"}
    assert {tuple(rest) for _, _, *rest in written} == {("3", "False")}


def fail(task: Path, wait: bool) -> bool:
    """One task ends its process, one raises an error, one is completed after the first began."""
    began = task.with_name("began")
    if task.name == "dies":
        began.touch()
        os._exit(9)
    if task.name == "raises":
        raise UserError(f"what the user did, {wait}")
    while not began.exists():
        time.sleep(POLL_SECONDS)
    task.touch()
    return True


def test_a_process_that_dies_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names the task; the one that runs beside it is completed."""
    tasks = {"step 1": tmp_path / "completed", "step 2": tmp_path / "dies"}
    message = r"step 2: its process ended with exit code 9 .* run again"
    with pytest.raises(UserError, match=message):
        list(run_tasks(fail, tasks, TWO_ON_CPU))
    assert (tmp_path / "completed").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_of_a_task_is_raised_as_it_is(tmp_path: Path) -> None:
    """As if the task had run in this process."""
    with pytest.raises(UserError, match=r"^what the user did, False$"):
        list(run_tasks(fail, {"one": tmp_path / "raises"}, TWO_ON_CPU))


def test_declined_tasks_come_last() -> None:
    """A task that another process is doing is put aside; only when all others are done is it waited
    for."""
    calls: list[tuple[str, bool]] = []

    def decline_a(task: str, wait: bool) -> bool:
        calls.append((task, wait))
        return wait or task != "a"

    tasks = {f"label {name}": name for name in "abc"}
    assert list(run_tasks(decline_a, tasks, ALONE)) == ["label b", "label c", "label a"]
    assert calls == [("a", False), ("b", False), ("c", False), ("a", True)]


def test_gpus_are_a_part_of_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole GPUs, none twice; too few are an error that names the key."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,3,1,0,2")
    assert assign_gpus(2, 2, KEY) == ["7,3", "1,0"]
    assert assign_gpus(3, 0, KEY) == ["", "", ""]
    message = "sampling.workers: 3 workers need 6 GPUs, but 5 are available; lower sampling.workers"
    with pytest.raises(UserError, match=re.escape(message)):
        assign_gpus(3, 2, KEY)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert assign_gpus(2, 1, KEY) == ["0", "1"]


def test_threads_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number in params, else OMP_NUM_THREADS, else an equal part of the cores; a single worker
    has PyTorch's own number."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [threads_per_worker(None, workers) for workers in (1, 3, 16)] == [None, 2, 1]
    assert threads_per_worker(5, 3) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads_per_worker(None, 3) is None
