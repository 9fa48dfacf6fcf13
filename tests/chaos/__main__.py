"""Interrupts and damages the smoke graph, and prints a table of what it survived.

    python -m tests.chaos /tmp/chaos/one --kills 60 --seed 1 [--minutes 30] [--only latents]

The folder gets a repository of its own, which is finished first (a few minutes); logs and copies
lie beside it. The table is that of docs/reliability.md.
"""

import argparse
import datetime
import os
import random
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.chaos import faults, processes
from tests.chaos.experiment import HEADER, STAGES, Experiment, Outcome

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Inject the faults, then the kills; exit code 1 if one of them was not survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder, or one of an earlier run")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=180, help="kills stop after this time")
    parser.add_argument(
        "--only", default="", help="only faults and stages whose name has this pattern"
    )
    args = parser.parse_args()
    began, outcomes = time.monotonic(), list[Outcome]()
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(args.folder.resolve())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for outcome in injected(experiment, args, end=began + 60 * args.minutes):
            outcomes.append(outcome)
            print(outcome.row(), flush=True)
    finally:
        experiment.left_behind(0)
    minutes = (time.monotonic() - began) / 60
    print(
        f"\n{datetime.date.today()}, seed {args.seed}, {minutes:.0f} minutes on {os.cpu_count()}"
        f" CPU cores\n\n{HEADER}"
    )
    for outcome in summed(outcomes):
        print(outcome.row())
    sys.exit(any(outcome.survived < outcome.injected for outcome in outcomes))


def injected(experiment: Experiment, args: argparse.Namespace, end: float) -> Iterator[Outcome]:
    """What became of each fault and each kill; there are no more kills after `end`."""
    for fault in (*faults.faults(experiment), *processes.faults(experiment)):
        if re.search(args.only, fault.name):
            yield experiment.fault(fault)
    chance = random.Random(args.seed)
    stages = [stage for stage in STAGES if re.search(args.only, stage)]
    for index in range(args.kills if stages else 0):
        if time.monotonic() > end:
            break
        # The second term: every stage gets every signal, whatever their number.
        number = SIGNALS[(index + index // len(stages)) % len(SIGNALS)]
        yield experiment.kill(stages[index % len(stages)], number, chance)


def summed(outcomes: list[Outcome]) -> list[Outcome]:
    """One outcome for each kind of fault."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.fault].append(outcome)
    return [
        Outcome(
            fault,
            injected=sum(outcome.injected for outcome in group),
            survived=sum(outcome.survived for outcome in group),
            left=sum(outcome.left for outcome in group),
            tracebacks=sum(outcome.tracebacks for outcome in group),
            lost_seconds=sum(outcome.lost_seconds for outcome in group),
            differing=sum(outcome.differing for outcome in group),
        )
        for fault, group in groups.items()
    ]


if __name__ == "__main__":
    main()
