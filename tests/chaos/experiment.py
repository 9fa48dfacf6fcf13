"""A finished smoke experiment whose stages are run again, interrupted, damaged and compared."""

import hashlib
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.test_pipeline import ENVIRONMENT, clone, run

MAX_SECONDS_TO_END = 5.0  # after SIGINT or SIGTERM, on a machine that is not overloaded
POLL_SECONDS = 0.01
MARK = "BOLTLM_CHAOS"  # in the environment of every process that the harness starts
CHECKPOINT_EVERY = 2  # steps; the preset has none before the last step
# What differs in every run (wall-clock figures, and who made them, when), and unfinished work.
VOLATILE = ("timings", "mlflow.db", "mlartifacts", ".git", ".dvc", ".work", "src")
PAGE = "reports/workspace/index.html"
# The stages, one of each kind that the smoke graph has: it has no input files.
STAGES = (
    "check",
    "base",
    "split",
    "teacher@warmstart",
    "train@em1",
    "latents@em1",
    "evaluate_base",
    "evaluate@em1",
    "curves@em1",
    "finetune@em1",
    "seeds",
    "figures",
    "summary",
    "report",
    "track",
)
HEADER = """\
| fault | injected | survived | processes left | tracebacks | work lost, s | files that differ |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |"""

Repair = Callable[[], None]


def nothing() -> None:
    """The stage repairs the damage itself."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Damage that `stage` meets. `injure` does it, raises AssertionError where what happens then is
    not as promised, and returns what the user does after the first run of the stage.
    `environment`: of that run; `succeeds`: it must not fail."""

    name: str
    stage: str
    injure: Callable[[], Repair]
    environment: Mapping[str, str] = field(default_factory=dict)
    succeeds: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a fault did: whether everything is as after an undisturbed run, processes that were left
    behind, tracebacks that a user saw, seconds of work that were done again, files that differ,
    and all of that in words."""

    fault: str
    injected: int
    survived: int
    left: int
    tracebacks: int
    lost_seconds: float
    differing: int
    problems: tuple[str, ...] = ()

    def row(self) -> str:
        """A line of the table, with the problems as comments."""
        text = f"| {self.fault} | {self.injected} | {self.survived} | {self.left}"
        text += f" | {self.tracebacks} | {self.lost_seconds:.0f} | {self.differing} |"
        return text + "".join(f"\n<!-- {problem} -->" for problem in self.problems)


class Experiment:
    """The repository in `folder`, finished once; `reference` is the content of its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "dvc.lock").is_file():
            clone(folder)
            params = folder / "params.yaml"
            often = f"checkpoint_every: {CHECKPOINT_EVERY}"
            params.write_text(re.sub(r"checkpoint_every: \d+", often, params.read_text("utf-8")))
            run(folder, "dvc", "repro")
        self.reference, self.logged = self.files(), self.logged_runs()
        self.seconds: dict[str, float] = {}

    def files(self) -> dict[str, str]:
        """SHA-256 of every file that must be the same after every run."""
        found: dict[str, str] = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder)
            if path.is_file() and name.parts[0] not in VOLATILE and "__pycache__" not in name.parts:
                content = path.read_bytes()
                if name.as_posix() == PAGE:
                    content = page_content(content.decode()).encode()
                found[name.as_posix()] = hashlib.sha256(content).hexdigest()
        return found

    def logged_runs(self) -> Counter[tuple[str, str]]:
        """How often MLflow has a run, by name and status."""
        with sqlite3.connect(self.folder / "mlflow.db") as database:
            command = "select name, status from runs where lifecycle_stage = 'active'"
            rows = Counter(database.execute(command).fetchall())
        database.close()
        return rows

    def start(self, stage: str, **environment: str) -> subprocess.Popen[bytes]:
        """`dvc repro --force` of one stage, in a process group of its own, without DVC's memory of
        earlier runs."""
        command = ("dvc", "repro", "--single-item", "--force", "--no-run-cache", stage)
        return self.start_command(command, **environment)

    def start_command(
        self, command: Sequence[str], log: str = "chaos.log", **environment: str
    ) -> subprocess.Popen[bytes]:
        with self.folder.with_name(log).open("wb") as file:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env={**ENVIRONMENT, MARK: str(self.folder), **environment},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def text(self, log: str = "chaos.log") -> str:
        """What the last command has printed."""
        return self.folder.with_name(log).read_text("utf-8", errors="replace")

    def run_until(
        self, stage: str, reached: Callable[[], bool], **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a stage and wait until it has reached a state."""
        process = self.start(stage, **environment)
        wait_until(process, reached)
        assert process.poll() is None, f"{stage} ended too early: {self.text()[-500:]}"
        return process

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
        signalled = time.monotonic()
        if process.poll() is None:
            os.killpg(process.pid, number)
        problems, left = [], self.left_behind(signalled + MAX_SECONDS_TO_END)
        process.wait()
        has_traceback = number != signal.SIGKILL and is_ours(self.text())
        if has_traceback:
            problems.append(f"{stage}: a traceback after {number.name}: {self.text()[-500:]}")
        problems += [f"{stage}: {command} is left after {number.name}" for command in left]
        resumed = time.monotonic()
        if self.start(stage).wait() != 0:
            problems.append(f"{stage}: did not run again: {self.text()[-500:]}")
        lost = (signalled - began) + (time.monotonic() - resumed) - seconds
        return self._outcome(
            f"{number.name} of the process group", stage, lost, left, has_traceback, problems
        )

    def fault(self, fault: Fault) -> Outcome:
        """Damage something, run a stage, repair what the user would, run it again and compare.
        The first run may fail, but without a traceback."""
        seconds = self.measure(fault.stage)
        began, problems, repair, has_traceback = time.monotonic(), [], nothing, False
        try:
            repair = fault.injure()
            code = self.start(fault.stage, **fault.environment).wait()
            has_traceback = code != 0 and is_ours(self.text())
            assert not has_traceback, f"a traceback: {self.text()[-500:]}"
            assert code == 0 or not fault.succeeds, f"exit code {code}: {self.text()[-500:]}"
        except AssertionError as error:
            problems.append(f"{fault.name}: {error}")
        repair()
        left = self.left_behind(time.monotonic() + MAX_SECONDS_TO_END)
        problems += [f"{fault.name}: {command} is left" for command in left]
        if self.start(fault.stage).wait() != 0:
            problems.append(f"{fault.name}: did not run again: {self.text()[-500:]}")
        lost = time.monotonic() - began - seconds
        return self._outcome(fault.name, fault.stage, lost, left, has_traceback, problems)

    def _outcome(
        self,
        name: str,
        stage: str,
        lost: float,
        left: Sequence[str],
        has_traceback: bool,
        problems: Sequence[str],
    ) -> Outcome:
        left = [*left, *self.left_behind(time.monotonic() + MAX_SECONDS_TO_END)]
        differing = self.differing_files()
        litter = [str(path) for path in (self.folder / ".work").rglob("*.lock")]
        now = self.logged_runs()
        litter += [f"a run in MLflow, {run}" for run in (now - self.logged).elements()]
        litter += [f"no run in MLflow, {run}" for run in (self.logged - now).elements()]
        found = [f"{stage}: {path} differs" for path in differing]
        found += [f"{stage}: left or lost: {text}" for text in litter]
        problems = (*problems, *found)
        return Outcome(
            name,
            injected=1,
            survived=int(not problems),
            left=len(left),
            tracebacks=int(has_traceback),
            lost_seconds=max(0.0, lost),
            differing=len(differing),
            problems=problems,
        )

    def differing_files(self) -> list[str]:
        """Files that are not as an undisturbed run leaves them, missing, or new."""
        now = self.files()
        names = sorted(now.keys() | self.reference.keys())
        return [name for name in names if now.get(name) != self.reference.get(name)]

    def left_behind(self, deadline: float) -> list[str]:
        """The commands of processes that the harness has started, directly or not, and that still
        run at `deadline`, a time of the monotonic clock; they are killed then."""
        while (processes := self._processes()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        commands = [" ".join(process.info["cmdline"] or ())[:150] for process in processes]
        for process in processes:
            process.kill()
        return commands

    def _processes(self) -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["environ", "cmdline", "status"])
            if (process.info["environ"] or {}).get(MARK) == str(self.folder)
            if process.info["status"] != psutil.STATUS_ZOMBIE
        ]


def wait_until(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """Wait until a state is reached or the process has ended."""
    while process.poll() is None and not reached():
        time.sleep(POLL_SECONDS)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL of the group of a process that was started above."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def page_content(page: str) -> str:
    """The HTML page of an experiment without the seconds that its stages took."""
    before, heading, after = page.partition("<h2>Cost and time</h2>")
    table, end, after = after.partition("</table>")
    table = re.sub(r"(<tr><td>[^<]*</td>)<td>[^<]*</td>", r"\1", table)
    return before + heading + table + end + after


def is_ours(text: str) -> bool:
    """Whether there is a traceback that goes through a file of the project."""
    return "Traceback" in text and re.search(r'File ".*?/?(src/boltlm|stages)/', text) is not None
