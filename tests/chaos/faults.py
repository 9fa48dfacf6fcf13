"""Damage to files, disks and databases of an experiment, each with what its user would do."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.experiment import Experiment, Fault, Repair, kill_group, nothing
from tests.test_pipeline import BIN, ENVIRONMENT

DAY_SECONDS = 86_400
# Bytes that a file of the stage may have at most: less than its output has.
FILE_LIMITS = {"split": 1_000, "train@em1": 60_000, "latents@em1": 1_000, "evaluate@em1": 1_000}
DISK_BYTES = 40_000  # of the disk for unfinished work
LIMIT = """\
#!{python}
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""


def faults(experiment: Experiment) -> Iterator[Fault]:
    """All of this module, in the order in which they are injected."""
    yield from _damaged_files(experiment)
    yield from _full_disks(experiment)
    yield from _places(experiment)
    yield from _clocks(experiment)


def flip_byte(path: Path) -> None:
    """Change one byte in the middle of a file, also of one that DVC has made read-only."""
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _damaged_files(experiment: Experiment) -> Iterator[Fault]:
    folder, work = experiment.folder, experiment.folder / ".work"

    def shard() -> Repair:
        experiment.forget_work()
        assert experiment.start("latents@em1").wait() == 0, experiment.text()
        flip_byte(next((work / "latents").rglob("*.parquet")))
        return nothing

    def table() -> Repair:
        experiment.forget_work()
        path = next((folder / "data" / "latents" / "em1").glob("*.parquet"))
        content = path.read_bytes()
        flip_byte(path)
        return lambda: _restore(path, content)

    def answers() -> Repair:
        experiment.forget_work()
        assert experiment.start("evaluate@em1").wait() == 0, experiment.text()
        path = next((work / "answers").rglob("*.jsonl"))
        text = path.read_bytes()
        path.write_bytes(text[: len(text) // 2])  # a line that was not finished
        return nothing

    def checkpoint() -> Repair:
        experiment.forget_work()
        process = experiment.run_until("train@em1", lambda: bool(_checkpoints(work)))
        kill_group(process)
        flip_byte(max(_checkpoints(work)).with_suffix(""))
        return nothing

    def cache_object() -> Repair:
        experiment.forget_work()
        output = folder / "data" / "latents" / "em1"
        content = next(output.glob("*.parquet")).read_bytes()
        objects = (folder / ".dvc" / "cache" / "files" / "md5").rglob("*")
        path = next(p for p in objects if p.is_file() and p.read_bytes() == content)
        flip_byte(path)  # and with it, where they are one file, the output
        verified = experiment.start_command(("boltlm", "verify", "--chunks", "1")).wait()
        assert verified == 1, f"boltlm verify ends with {verified}"
        name = str(path.relative_to(folder))
        assert f"{name}: damaged copy in DVC's cache" in experiment.text(), experiment.text()
        path.unlink()
        shutil.rmtree(output)
        return nothing

    def database() -> Repair:
        path = folder / "mlflow.db"
        content = path.read_bytes()
        path.write_bytes(b"damaged" + content[7:])
        return lambda: _restore(path, content)

    yield Fault("a byte of a finished shard in .work changed", "latents@em1", shard)
    yield Fault("a byte of a table in data changed", "train@em1", table)
    yield Fault("a byte of a training checkpoint changed", "train@em1", checkpoint, succeeds=True)
    yield Fault("a byte of an object in DVC's cache changed", "latents@em1", cache_object)
    yield Fault("saved answers cut off", "evaluate@em1", answers)
    yield Fault("MLflow's database damaged", "track", database)


def _full_disks(experiment: Experiment) -> Iterator[Fault]:
    work = experiment.folder / ".work"

    def forget() -> Repair:
        experiment.forget_work()
        return nothing

    for stage, size in FILE_LIMITS.items():
        environment = {"PATH": f"{_limited_python(experiment.folder, stage, size)}:{_path()}"}
        yield Fault("files cannot grow (RLIMIT_FSIZE)", stage, forget, environment)

    def small_disk() -> Repair:
        experiment.forget_work()
        work.mkdir()
        subprocess.run(_mount(work), check=True)

        def unmount() -> None:
            subprocess.run(("umount", str(work)), check=True)

        return unmount

    if _can_mount(experiment.folder):
        for stage in ("split", "train@em1", "latents@em1"):
            yield Fault("the disk of .work is full", stage, small_disk)
    else:
        print("skipped, because a disk can be mounted by root only: the disk of .work is full")


def _places(experiment: Experiment) -> Iterator[Fault]:
    folder, work = experiment.folder, experiment.folder / ".work"

    def blocked() -> Repair:
        output = folder / "metrics" / "latents"
        moved = folder.with_name("moved")
        shutil.move(output, moved)
        output.write_text("a file where a folder should be", encoding="utf-8")

        def repair() -> None:
            output.unlink(missing_ok=True)
            shutil.move(moved, output)

        return repair

    def removed() -> Repair:
        experiment.forget_work()
        process = experiment.run_until("train@em1", lambda: bool(_checkpoints(work)))
        experiment.forget_work()
        process.wait()
        assert "Traceback" not in experiment.text(), experiment.text()
        return experiment.forget_work  # as the error says: what is left of the work is incomplete

    yield Fault("an output that cannot be written", "latents@em1", blocked)
    yield Fault(".work deleted during a training", "train@em1", removed)
    address = f"http://127.0.0.1:{_free_port()}"
    environment = {"MLFLOW_TRACKING_URI": address}
    yield Fault("the tracking server gone", "track", lambda: nothing, environment, succeeds=True)


def _clocks(experiment: Experiment) -> Iterator[Fault]:
    """The clock of the machine itself is not set; files have the times of another clock."""
    folder, work = experiment.folder, experiment.folder / ".work"

    def interrupted_at(seconds: float) -> Repair:
        experiment.forget_work()
        process = experiment.run_until("latents@em1", lambda: any(work.rglob("*.parquet.sha256")))
        kill_group(process)
        for root in (work, folder / "data", folder / "models"):
            for path in root.rglob("*"):
                os.utime(path, (seconds, seconds))
        return nothing

    tomorrow = time.time() + DAY_SECONDS
    name = "file times of {} after an interruption"
    yield Fault(
        name.format("tomorrow"), "latents@em1", lambda: interrupted_at(tomorrow), succeeds=True
    )
    yield Fault(
        name.format("1970"), "latents@em1", lambda: interrupted_at(DAY_SECONDS), succeeds=True
    )


def _checkpoints(work: Path) -> list[Path]:
    """The checksums of the training checkpoints that count."""
    return list((work / "train").rglob("step-*.pt.sha256"))


def _restore(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def _path() -> str:
    return ENVIRONMENT["PATH"]


def _limited_python(folder: Path, stage: str, size: int) -> Path:
    """A folder with a `python` whose files may have at most `size` bytes."""
    out = folder.with_name("limited") / stage
    out.mkdir(parents=True, exist_ok=True)
    path = out / "python"
    path.write_text(LIMIT.format(python=str(BIN / "python"), size=size), encoding="utf-8")
    path.chmod(0o755)
    return out


def _mount(folder: Path) -> tuple[str, ...]:
    options = f"size={DISK_BYTES // 1024}k"
    return ("mount", "-t", "tmpfs", "-o", options, "boltlm-chaos", str(folder))


def _can_mount(folder: Path) -> bool:
    place = folder.with_name("mounted")
    place.mkdir(exist_ok=True)
    if os.geteuid() != 0 or subprocess.run(_mount(place), stderr=subprocess.DEVNULL).returncode:
        return False
    subprocess.run(("umount", str(place)), check=True)
    return True


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
