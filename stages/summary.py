"""Writes the few numbers that say how the experiment went, and the tables that DVC draws.

    python stages/summary.py --params params.yaml --metrics metrics --out metrics/summary.json \
        --tables metrics/plots

To look at them: dvc exp show, dvc metrics show, dvc plots show.
"""

import argparse
from pathlib import Path

from boltlm.errors import run_main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("params", "metrics", "out", "tables"):
        parser.add_argument(f"--{flag}", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from boltlm.preflight.check import check_params

    check_params(args.params)
    from boltlm.params import load_settings
    from boltlm.reporting.arms import ReportSettings
    from boltlm.reporting.headline import write_summary
    from boltlm.reporting.results import read_results

    settings = load_settings(ReportSettings, args.params)
    write_summary(read_results(settings, args.metrics), args.out, args.tables)


if __name__ == "__main__":
    run_main(main)
