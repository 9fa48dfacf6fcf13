"""Draws the pictures of the whole experiment and writes the report with its numbers.

    python stages/figures.py --params params.yaml --metrics metrics \
        --out metrics/figures
"""

import argparse
from pathlib import Path

from boltlm.errors import stage
from boltlm.params import load


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--params", "--metrics", "--out"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from boltlm.figures.report import make  # brings matplotlib: not for --help

    make(load(args.params), metrics=args.metrics, out=args.out)


if __name__ == "__main__":
    stage(main)
