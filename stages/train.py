"""Trains a model on a corpus, with latents or raw.

    python stages/train.py --params params.yaml --name em1 --parent models/base \
        --chunks data/chunks/em --data data/latents/em1 --work .work --out models/em1 \
        --csv metrics/train/em1.csv
"""

import argparse
from pathlib import Path

from boltlm.engine import work_root
from boltlm.errors import stage
from boltlm.model.runs import run
from boltlm.params import load


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    for flag in ("--params", "--parent", "--chunks", "--data", "--work", "--out", "--csv"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    run(
        load(args.params),
        args.name,
        parent=args.parent,
        chunks=args.chunks,
        data=args.data,
        work=work_root(args.work),
        out=args.out,
        csv_path=args.csv,
    )


if __name__ == "__main__":
    stage(main)
