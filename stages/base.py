"""Makes the base model and adds the four special tokens.

python stages/base.py --params params.yaml --out models/base --csv metrics/train/base.csv
"""

import argparse
from pathlib import Path

from boltlm.errors import stage
from boltlm.model import base
from boltlm.params import load


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--csv", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    base.make(load(args.params), args.out, args.csv)


if __name__ == "__main__":
    stage(main)
