"""Fine-tunes a model on questions with thoughts, and asks it held-out ones.

    python stages/finetune.py --params params.yaml --name em1 --model models/em1 \
        --split data/split --data data/split/warmstart --work .work --out data/finetune/em1 \
        --metrics metrics/finetune/em1.json
"""

import argparse
from pathlib import Path

from boltlm.engine import work_root
from boltlm.errors import stage
from boltlm.evaluation.finetune import Places, finetune
from boltlm.params import load
from boltlm.records import write_json


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    for flag in ("--params", "--model", "--split", "--data", "--work", "--out", "--metrics"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    places = Places(args.model, args.split, args.data, work_root(args.work), args.out)
    write_json(args.metrics, finetune(load(args.params), args.name, places))


if __name__ == "__main__":
    stage(main)
