"""Aggregates metrics over seeds: trainings of this experiment, and experiments collected before.

    python stages/seeds.py --params params.yaml --metrics metrics --collected metrics/collected \
        --out metrics/seeds
"""

import argparse
from pathlib import Path

from boltlm.errors import run_main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("params", "metrics", "collected", "out"):
        parser.add_argument(f"--{flag}", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from boltlm.preflight.check import check_params

    check_params(args.params)
    from boltlm.params import load_settings
    from boltlm.reporting.seed_tables import SeedsSettings, aggregate_experiment

    settings = load_settings(SeedsSettings, args.params)
    aggregate_experiment(settings, args.metrics, args.collected, args.out)


if __name__ == "__main__":
    run_main(main)
