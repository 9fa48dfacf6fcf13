"""Makes the base model and adds the four special tokens.

python stages/base.py --params params.yaml --work .work --out models/base \
    --csv metrics/train/base.csv
"""

import argparse
from pathlib import Path

from boltlm.engine import work_root
from boltlm.errors import stage
from boltlm.model import base
from boltlm.params import load


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--params", "--work", "--out", "--csv"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    base.make(load(args.params), work_root(args.work), args.out, args.csv)


if __name__ == "__main__":
    stage(main)
