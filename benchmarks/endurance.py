"""Memory, file handles and threads of a run that is stretched 50 times.

    python benchmarks/endurance.py

The E-step over shards of one document, the chat completions of a teacher, and a training with a
checkpoint every ten steps; each in a process of its own, short and 50 times as long. Memory is the
peak of the process, in MiB; handles and threads are the most that it ever has open. The exit code
is 1 where a long run has more than 1.15 times the memory of the short one, or more handles
(but for two that can be open by chance at one of many more looks).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

FACTOR = 50
MAX_MEMORY_RATIO = 1.15
MORE_HANDLES = 2  # files that were open by chance at one of many more looks
SECONDS = 0.02  # between two looks at the process
CHECKPOINT_EVERY = 10  # steps
# The size of each short run: shards, documents whose chunks are asked about, steps.
SIZES = {"estep": 6, "teacher": 40, "training": 40}


class Watch:
    """The most file handles and threads that this process has had inside a `with` statement."""

    def __init__(self) -> None:
        self.process, self.ended = psutil.Process(), threading.Event()
        self.handles = self.threads = 0

    def __enter__(self) -> "Watch":
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()

    def _look(self) -> None:
        while not self.ended.wait(SECONDS):
            self.handles = max(self.handles, self.process.num_fds())
            self.threads = max(self.threads, self.process.num_threads())


def run_estep(size: int, args: argparse.Namespace) -> None:
    from tests.estep.stage_harness import LatentsStage

    LatentsStage(args.folder, args.model.resolve(), 1, documents=size).run()


def run_teacher(size: int, args: argparse.Namespace) -> None:
    from tests.teachers.stage_harness import TeacherStage

    stage = TeacherStage(args.folder, args.model.resolve(), documents=size)
    stage.configure("openai", None, base_url=args.url, max_cost_usd=1e6)
    stage.run_in_process()


def run_training(size: int, args: argparse.Namespace) -> None:
    import numpy as np

    from boltlm.training.checkpointing import CheckpointManager
    from boltlm.training.trainer import train_model
    from tests import tiny
    from tests.training import harness

    config = tiny.train_config(checkpoint_every=CHECKPOINT_EVERY)
    tokens = size * config.batch_size * harness.SEQUENCE_LENGTH
    stream = np.arange(tokens + 1, dtype=np.int32) % harness.VOCAB_SIZE
    train_model(
        harness.make_model(),
        tiny.rows(stream, harness.SEQUENCE_LENGTH, harness.SEED),
        config,
        seed=harness.SEED,
        csv_path=args.folder / "curve.csv",
        what="endurance",
        checkpoints=CheckpointManager(args.folder / "work", CHECKPOINT_EVERY, "endurance"),
    )


PARTS = {"estep": run_estep, "teacher": run_teacher, "training": run_training}


def measured(part: str, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run in a process of its own."""
    from tests.teachers.server import KEY
    from tests.teachers.stage_harness import ServerProcess

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = ServerProcess(folder / "server").start()
        command = [sys.executable, __file__, "--part", part, "--size", str(size)]
        command += ["--model", str(args.model), "--folder", name, "--url", server.url]
        try:
            process = subprocess.run(
                command,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1"},
            )
        finally:
            server.stop()
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "base")
    parser.add_argument("--part", choices=PARTS, help="only this one")
    for flag, kind in (("--size", int), ("--folder", Path), ("--url", str)):
        parser.add_argument(flag, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.size is not None:
        with Watch() as watch:
            PARTS[args.part](args.size, args)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        facts = {"size": args.size, "peak_mib": memory, "handles": watch.handles}
        print(json.dumps({**facts, "threads": watch.threads}))
        return
    failed = False
    for part in [args.part] if args.part else PARTS:
        short, long = (measured(part, SIZES[part] * factor, args) for factor in (1, FACTOR))
        ratio = long["peak_mib"] / short["peak_mib"]
        failed |= ratio > MAX_MEMORY_RATIO or long["handles"] > short["handles"] + MORE_HANDLES
        print(json.dumps({"part": part, "short": short, "long": long, "memory_ratio": ratio}))
    sys.exit(failed)


if __name__ == "__main__":
    main()
