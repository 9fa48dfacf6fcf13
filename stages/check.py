"""Checks params.yaml and the files that it names, before any other stage runs.

    python stages/check.py --params params.yaml --marker params.checked

The marker says that nothing was wrong. `boltlm check` also checks the machine.
"""

import argparse
from pathlib import Path

from boltlm.errors import run_main
from boltlm.preflight.check import check_data


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--params", "--marker"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_data(args.params)
    args.marker.write_text("checked\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
