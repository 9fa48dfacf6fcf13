"""How processes end: after a signal with one line, with their workers, and with their parent."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from boltlm import interruption
from boltlm.errors import UserError, redact_secrets, run_main
from tests import tiny

POLL_SECONDS = 0.01
LINE = "interrupted; run the same command again to resume\n"
# What the main thread of a stage may be doing when a signal comes.
WAITING = "time.sleep(600)"
DEAF = """
while True:  # a library that catches every exception
    try:
        time.sleep(600)
    except BaseException:
        pass
"""
WITH_TASKS = """
from boltlm.estep.worker_processes import Workers, run_tasks
workers = Workers(count=1, gpus_per_worker=0, threads=1, isolated=True, key="key")
list(run_tasks(script.sleep, {"one": 1}, workers))
"""
WITH_WORKER = """
import multiprocessing
from boltlm import interruption
worker = multiprocessing.get_context("spawn").Process(target=script.work)
with interruption.without_ctrl_c():
    worker.start()
worker.join()
"""
SCRIPT = """
import os, sys, time
from pathlib import Path
from boltlm.errors import run_main

def sleep(task, wait):
    Path(f"ready-{os.getpid()}").touch()
    time.sleep(600)

def work():
    from boltlm import interruption
    interruption.end_with_parent(9)
    sleep(1, True)

def main():
    import script
    Path(f"ready-{os.getpid()}").touch()
    BODY

if __name__ == "__main__":
    run_main(main)
"""


@contextmanager
def started(
    folder: Path, body: str, *launcher: str, **variables: str
) -> Iterator[subprocess.Popen]:
    """A script like that of a stage, in a process group of its own, which is killed at the end."""
    text = SCRIPT.replace("BODY", textwrap.indent(body, "    ").strip())
    (folder / "script.py").write_text(text, encoding="utf-8")
    path = os.pathsep.join([str(tiny.ROOT / "src"), str(folder)])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    command = [sys.executable, *launcher, "script.py"]
    with (folder / "stderr.txt").open("wb") as stderr:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stderr=stderr, start_new_session=True
        )
    try:
        yield process
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_ready(folder: Path, count: int) -> list[psutil.Process]:
    """The processes that have begun their work."""
    while len(ready := list(folder.glob("ready-*"))) < count:
        time.sleep(POLL_SECONDS)
    return [psutil.Process(int(path.name.removeprefix("ready-"))) for path in ready]


def errors(folder: Path) -> str:
    return (folder / "stderr.txt").read_text("utf-8")


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("body", [WAITING, DEAF], ids=["waiting", "deaf"])
def test_a_signal_ends_a_stage_with_one_line(
    body: str, number: signal.Signals, tmp_path: Path
) -> None:
    """Also where a library catches the exception: then after some seconds."""
    with started(tmp_path, body) as process:
        wait_until_ready(tmp_path, 1)
        process.send_signal(number)
        assert process.wait() == 128 + number
    assert errors(tmp_path) == LINE


@pytest.mark.parametrize("group", [True, False], ids=["group", "stage"])
def test_a_signal_ends_the_workers_too(group: bool, tmp_path: Path) -> None:
    """Whether the terminal sends it to all processes or a user to the stage."""
    with started(tmp_path, WITH_TASKS if group else WITH_WORKER) as process:
        workers = wait_until_ready(tmp_path, 2)
        send = os.killpg if group else os.kill
        send(process.pid, signal.SIGINT)
        assert process.wait() == 130
        assert_gone(workers)
    assert errors(tmp_path) == LINE


def test_workers_do_not_outlive_the_stage(tmp_path: Path) -> None:
    """Not even if it has no time to end them."""
    with started(tmp_path, WITH_WORKER) as process:
        workers = wait_until_ready(tmp_path, 2)
        process.kill()
        process.wait()
        assert_gone(workers)


def test_a_stage_does_not_outlive_dvc(tmp_path: Path) -> None:
    """It ends as after SIGTERM. A stage that a user has started by hand goes on."""
    parent = "import subprocess, sys; subprocess.run([sys.executable, 'script.py'])"
    for variables in ({"DVC_STAGE": "train@em1"}, {}):
        with started(tmp_path, WAITING, "-c", parent, **variables) as process:
            (stage,) = wait_until_ready(tmp_path, 1)
            process.kill()
            process.wait()
            if variables:
                assert_gone([stage])
                assert errors(tmp_path) == LINE
                next(tmp_path.glob("ready-*")).unlink()
            else:
                assert stage.is_running()
                stage.kill()


LAUNCHER = ("-m", "boltlm.training.launch", "--num_processes", "2", "--num_machines", "1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_of_a_launcher_end_with_it(number: signal.Signals, tmp_path: Path) -> None:
    """After Ctrl-C with one line; none of them outlives a launcher that was killed."""
    precision = ("--mixed_precision", "no", "--dynamo_backend", "no", "--use_fsdp")
    with started(tmp_path, WAITING, *LAUNCHER, *precision) as process:
        ranks = wait_until_ready(tmp_path, 2)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
            assert process.wait() == 130
            assert errors(tmp_path) == LINE
        else:
            process.kill()
        assert_gone(ranks)


def fail() -> None:
    raise UserError("wrong")


def test_outputs_that_dvc_has_removed_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the error, and only those that an earlier run of this stage has made."""
    outs = [{"path": name, "md5": "0"} for name in ("models/em1", "metrics/em1.json", "kept")]
    lock = {"stages": {"train@em1": {"cmd": "true", "outs": outs}}}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(lock))
    (tmp_path / "kept").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interruption, "handle_signals", lambda: None)
    monkeypatch.setattr(interruption, "end_with_parent", lambda _: None)
    note = (
        "note: DVC has removed models/em1, metrics/em1.json before this run; to have the earlier"
        " ones back: dvc checkout train@em1 (files in metrics/: git checkout)\n"
    )
    for stage, expected in (("train@em1", note), ("train@em2", ""), (None, "")):
        if stage is None:
            monkeypatch.delenv("DVC_STAGE")
        else:
            monkeypatch.setenv("DVC_STAGE", stage)
        with pytest.raises(SystemExit):
            run_main(fail)
        assert capsys.readouterr().err == f"{expected}error: wrong\n"


def test_credentials_in_an_address_are_not_shown() -> None:
    """As an error of a tracking server has them."""
    text = "cannot reach http://ann:hunter2@127.0.0.1:5000/api; see https://mlflow.org/a@b"
    expected = "cannot reach http://[key]@127.0.0.1:5000/api; see https://mlflow.org/a@b"
    assert redact_secrets(text) == expected
