"""A finished smoke experiment whose stages are run again, interrupted, damaged and compared."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.test_pipeline import ENVIRONMENT, clone, run

MAX_SECONDS_TO_END = 5.0  # after SIGINT or SIGTERM, on a machine that is not overloaded
# What differs in every run: wall-clock figures, and who made them, when.
VOLATILE = (
    "dvc.lock",
    "timings",
    "mlflow.db",
    "mlartifacts",
    "reports",
    ".git",
    ".dvc",
    ".work",
    "src",
)
# The stages, one of each kind, with what they make.
STAGES = (
    "base",
    "split",
    "teacher@warmstart",
    "train@em1",
    "latents@em1",
    "evaluate@em1",
    "curves@em1",
    "finetune@em1",
    "figures",
    "report",
    "track",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a fault did: whether the artefacts are those of an undisturbed run, seconds of work that
    were done again, and what was found that should not be."""

    fault: str
    injected: int
    survived: int
    lost_seconds: float
    problems: tuple[str, ...] = ()

    def row(self) -> str:
        text = f"| {self.fault} | {self.injected} | {self.survived} | {self.lost_seconds:.0f} |"
        return text + "".join(f"\n<!-- {problem} -->" for problem in self.problems)


HEADER = "| fault | injected | survived | seconds of work lost |\n| --- | ---: | ---: | ---: |"


class Experiment:
    """The repository in `folder`, finished once; `reference` is the content of its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "dvc.lock").is_file():
            clone(folder)
            run(folder, "dvc", "repro")
        self.reference = self.files()
        self.seconds: dict[str, float] = {}

    def files(self) -> dict[str, str]:
        """SHA-256 of every file that must be the same after every run."""
        found: dict[str, str] = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder)
            if path.is_file() and name.parts[0] not in VOLATILE and "__pycache__" not in name.parts:
                found[name.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def start(self, stage: str) -> subprocess.Popen[bytes]:
        """`dvc repro --force` of one stage, in a process group of its own, without DVC's memory of
        earlier runs."""
        command = ["dvc", "repro", "--single-item", "--force", "--no-run-cache", stage]
        return self.start_command(*command)

    def start_command(self, *command: str) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=ENVIRONMENT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self) -> Path:
        return self.folder.with_name("chaos.log")

    def text(self) -> str:
        return self.log.read_text("utf-8", errors="replace")

    def forget_work(self) -> None:
        shutil.rmtree(self.folder / ".work", ignore_errors=True)

    def measure(self, stage: str) -> float:
        """How long an undisturbed run of a stage takes, once; seconds."""
        if stage not in self.seconds:
            self.forget_work()
            began = time.monotonic()
            assert self.start(stage).wait() == 0, self.text()
            self.seconds[stage] = time.monotonic() - began
        return self.seconds[stage]

    def kill(self, stage: str, number: signal.Signals, chance: random.Random) -> Outcome:
        """Signal the whole group at a random moment of the stage, run it again, and compare."""
        seconds = self.measure(stage)
        self.forget_work()
        began = time.monotonic()
        process = self.start(stage)
        time.sleep(chance.uniform(0, seconds))
        family = _family(process.pid)
        signalled = time.monotonic()
        if process.poll() is None:
            os.killpg(process.pid, number)
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=MAX_SECONDS_TO_END)
        problems = [f"{stage}: process left: {_command(left)}" for left in alive]
        for left in alive:
            left.kill()
        printed, lost = self.text(), signalled - began
        if number != signal.SIGKILL and "Traceback" in printed and "boltlm" in printed:
            problems.append(f"{stage}: a traceback after {number.name}")
        resumed = time.monotonic()
        if self.start(stage).wait() != 0:
            problems.append(f"{stage}: did not run again: {self.text()[-500:]}")
        lost = max(0.0, lost + time.monotonic() - resumed - seconds)
        problems += self.differences(stage)
        survived = not any("file" in p or "run again" in p or "left" in p for p in problems)
        name = f"{number.name} of the process group"
        return Outcome(name, 1, int(survived), lost, tuple(problems))

    def fault(self, name: str, stage: str, injure: Callable[[], Callable[[], None]]) -> Outcome:
        """Damage something, run a stage, repair what the user would, run it again and compare.
        `injure` returns the repair. The first run may fail, but without a traceback."""
        began, problems = time.monotonic(), []
        repair = injure()
        if self.start(stage).wait() != 0 and "Traceback" in self.text():
            problems.append(f"{name}: a traceback: {self.text()[-300:]}")
        repair()
        if self.start(stage).wait() != 0:
            problems.append(f"{name}: did not run again: {self.text()[-500:]}")
        problems += self.differences(stage)
        lost = max(0.0, time.monotonic() - began - self.seconds.get(stage, 0.0))
        return Outcome(name, 1, int(not problems), lost, tuple(problems))

    def differences(self, stage: str) -> list[str]:
        """Files that are not as an undisturbed run leaves them, or that should not be there."""
        now = self.files()
        names = sorted(now.keys() | self.reference.keys())
        changed = [name for name in names if now.get(name) != self.reference.get(name)]
        locks = [str(path) for path in (self.folder / ".work").rglob("*.lock")]
        return [f"{stage}: file {name} differs" for name in changed] + [
            f"{stage}: lock file {path}" for path in locks
        ]


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.NoSuchProcess:
        return "?"
