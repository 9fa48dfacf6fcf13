"""Damage to files, disks and databases of an experiment, each with what its user would do."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.chaos.experiment import Experiment

Repair = Callable[[], None]


def nothing() -> None:
    """The stage repairs the damage itself."""


def flip_byte(path: Path) -> None:
    """Change one byte in the middle of a file, also of one that DVC has made read-only."""
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def faults(experiment: Experiment) -> Iterator[tuple[str, str, Callable[[], Repair]]]:
    """The name of each fault, the stage that meets it, and a function that injects it and returns
    its repair."""
    folder = experiment.folder

    def sealed_shard() -> Repair:
        experiment.forget_work()
        assert experiment.start("latents@em1").wait() == 0, experiment.text()
        flip_byte(next((folder / ".work" / "latents").rglob("*.parquet")))
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
        path = next((folder / ".work" / "answers").rglob("*.jsonl"))
        text = path.read_bytes()
        path.write_bytes(text[: len(text) // 2])  # a line that was not finished
        return nothing

    def read_only() -> Repair:
        output = folder / "metrics" / "latents"
        moved = folder.with_name("moved")
        shutil.move(output, moved)
        output.write_text("a file where a folder should be", encoding="utf-8")

        def repair() -> None:
            output.unlink(missing_ok=True)
            shutil.move(moved, output)

        return repair

    def database() -> Repair:
        path = folder / "mlflow.db"
        content = path.read_bytes()
        path.write_bytes(b"damaged" + content[7:])
        return lambda: _restore(path, content)

    yield "a byte of a finished shard in .work changed", "latents@em1", sealed_shard
    yield "a byte of a table in data changed", "train@em1", table
    yield "saved answers cut off", "evaluate@em1", answers
    yield "an output that cannot be written", "latents@em1", read_only
    yield "MLflow's database damaged", "track", database


def _restore(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)
