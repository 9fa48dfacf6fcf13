"""Measures a model: likelihood bounds, raw likelihood, and answers to questions.

    python stages/evaluate.py --params params.yaml --name em1 --model models/em1 \
        --split data/split --chunks data/chunks --work .work --out data/evaluate/em1 \
        --metrics metrics/eval/em1.json
"""

import argparse
from pathlib import Path

from boltlm.engine import work_root
from boltlm.errors import stage
from boltlm.evaluation.measure import Places, measure
from boltlm.params import load
from boltlm.records import write_json


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    for flag in ("--params", "--model", "--split", "--chunks", "--work", "--out", "--metrics"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    places = Places(args.model, args.split, args.chunks, work_root(args.work), args.out)
    write_json(args.metrics, measure(load(args.params), args.name, places))


if __name__ == "__main__":
    stage(main)
