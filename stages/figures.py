"""Draws the figures of the whole experiment and writes the report with its numbers.

python stages/figures.py --params params.yaml --metrics metrics --out metrics/figures
"""

import argparse
from pathlib import Path

from boltlm.errors import run_main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--params", "--metrics", "--out"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from boltlm.preflight.check import check_params

    check_params(args.params)
    from boltlm.params import load_settings
    from boltlm.reporting.experiment import FigureSettings
    from boltlm.reporting.report import write_report  # imports matplotlib, which --help need not

    settings = load_settings(FigureSettings, args.params)
    write_report(settings, metrics=args.metrics, out=args.out)


if __name__ == "__main__":
    run_main(main)
