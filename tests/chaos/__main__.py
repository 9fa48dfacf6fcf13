"""Interrupts and damages the smoke graph, and prints a table of what it survived.

    python -m tests.chaos /tmp/chaos --kills 60 --seed 1 [--minutes 30]

The folder gets a repository of its own, which is finished first (a few minutes).
"""

import argparse
import random
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

from tests.chaos import faults
from tests.chaos.experiment import HEADER, STAGES, Experiment, Outcome

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Run the kills and then the other faults; exit code 1 if one of them was not survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder, or one of an earlier run")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=180, help="kills stop after this time")
    args = parser.parse_args()
    chance, outcomes = random.Random(args.seed), []
    experiment = Experiment(args.folder)
    end = time.monotonic() + 60 * args.minutes
    for name, stage, injure in faults.faults(experiment):
        outcomes.append(experiment.fault(name, stage, injure))
        print(outcomes[-1].row(), flush=True)
    for index in range(args.kills):
        if time.monotonic() > end:
            break
        stage, number = STAGES[index % len(STAGES)], SIGNALS[index % len(SIGNALS)]
        outcomes.append(experiment.kill(stage, number, chance))
        print(f"{stage}: {outcomes[-1].row()}", flush=True)
    print(f"\nseed {args.seed}\n\n{HEADER}")
    for outcome in summed(outcomes):
        print(outcome.row())
    sys.exit(any(outcome.survived < outcome.injected for outcome in outcomes))


def summed(outcomes: list[Outcome]) -> list[Outcome]:
    """One outcome for each kind of fault."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.fault].append(outcome)
    return [
        Outcome(
            fault,
            sum(outcome.injected for outcome in group),
            sum(outcome.survived for outcome in group),
            sum(outcome.lost_seconds for outcome in group),
        )
        for fault, group in groups.items()
    ]


if __name__ == "__main__":
    main()
