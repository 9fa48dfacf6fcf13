"""Lets a test interrupt the stage `latents` at a known point: workers wait at a barrier.

    python -m tests.estep.shard_barrier stages/latents.py --name em1 …

runs the stage script with the barrier in place.
"""

import runpy
import sys
import time
from pathlib import Path

from boltlm.estep import run
from boltlm.estep.shard_worker import ShardTask
from boltlm.records import Sample

SHARDS_BEFORE = 2  # complete shards after which workers wait
OPENED = "barrier-opened"


class BarrierTask(ShardTask):
    """A task whose workers, before a shard, wait while SHARDS_BEFORE shards are complete and the
    barrier has not been opened."""

    __slots__ = ()

    def reusable_samples(self, shard: str) -> list[list[Sample]] | None:
        work = self.folder.parent.parent
        while len(complete_shards(work)) >= SHARDS_BEFORE and not (work / OPENED).exists():
            time.sleep(0.01)
        return super().reusable_samples(shard)


def complete_shards(work: Path) -> dict[str, int]:
    """The checksum file of each complete shard, with the time at which it was written (ns)."""
    paths = (work / "latents").rglob("*.parquet.sha256")
    return {path.name: path.stat().st_mtime_ns for path in paths}


def at_barrier(work: Path) -> bool:
    """Whether workers have reached the barrier."""
    return len(complete_shards(work)) >= SHARDS_BEFORE


def open_barrier(work: Path) -> None:
    (work / OPENED).touch()


if __name__ == "__main__":
    from tests.estep import shard_barrier  # workers import the task by this name

    run.ShardTask = shard_barrier.BarrierTask
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
