"""Describes a file or folder that the experiment reads, so that DVC notices when it changes.

python stages/input.py --path corpora/books.jsonl --out metrics/inputs/books.json
"""

import argparse
from pathlib import Path

from boltlm.errors import run_main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--path", "--out"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from boltlm.corpus.inputs import describe_input
    from boltlm.records import write_json

    write_json(args.out, describe_input(args.path))


if __name__ == "__main__":
    run_main(main)
