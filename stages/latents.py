"""Draws, weighs and selects latents for each chunk of a corpus: the E-step.

    python stages/latents.py --params params.yaml --name em1 --model models/warmstart \
        --split data/split/em --chunks data/chunks/em --work .work --out data/latents/em1 \
        --metrics metrics/latents/em1.json --histogram metrics/latents/em1.csv
"""

import argparse
from pathlib import Path

from boltlm.engine import work_root
from boltlm.errors import stage
from boltlm.params import load
from boltlm.records import write_json
from boltlm.sampling.shards import run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    for flag in ("--params", "--model", "--split", "--chunks", "--work", "--out"):
        parser.add_argument(flag, type=Path, required=True)
    for flag in ("--metrics", "--histogram"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    measured = run(
        load(args.params),
        args.name,
        model=args.model,
        split=args.split,
        chunks=args.chunks,
        work=work_root(args.work),
        out=args.out,
        histogram_path=args.histogram,
    )
    write_json(args.metrics, measured)


if __name__ == "__main__":
    stage(main)
