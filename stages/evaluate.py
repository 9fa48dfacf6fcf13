"""Measures a model: likelihood bounds, raw likelihood, and answers to held-out questions.

    python stages/evaluate.py --params params.yaml --name em1 --model models/em1 \
        --split data/split --chunks data/chunks/heldout --out data/evaluate/em1 \
        --metrics metrics/eval/em1.json
"""

import argparse
from pathlib import Path

from boltlm.errors import stage
from boltlm.evaluation.measure import measure
from boltlm.params import load
from boltlm.records import write_json


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    for flag in ("--params", "--model", "--split", "--chunks", "--out", "--metrics"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    measured = measure(
        load(args.params),
        args.name,
        model=args.model,
        split=args.split,
        chunks=args.chunks,
        out=args.out,
    )
    write_json(args.metrics, measured)


if __name__ == "__main__":
    stage(main)
