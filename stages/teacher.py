"""Writes what a teacher says about each chunk of a corpus.

    python stages/teacher.py --params params.yaml --name warmstart --base models/base \
        --split data/split/warmstart --chunks data/chunks/warmstart \
        --journal journal/answers.sqlite --out data/teacher/warmstart \
        --metrics metrics/teacher/warmstart.json

The journal keeps every answer of a teacher that is asked; it lies in the real repository also when
DVC runs a queued experiment in a copy.
"""

import argparse
from pathlib import Path

from boltlm.engine import work_root
from boltlm.errors import stage
from boltlm.latents.teachers import write
from boltlm.params import load
from boltlm.records import write_json
from boltlm.tokens import TextCoder


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    for flag in ("--params", "--base", "--split", "--chunks", "--journal", "--out", "--metrics"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    counts = write(
        load(args.params),
        args.name,
        TextCoder(args.base),
        split=args.split,
        chunks=args.chunks,
        out=args.out,
        journal=work_root(args.journal),
    )
    write_json(args.metrics, counts)


if __name__ == "__main__":
    stage(main)
