"""Makes the base model: pretrains a small one or takes a checkpoint, and adds four special tokens.

    python stages/base.py --params params.yaml --work .work --timings timings \
        --out models/base --csv metrics/train/base.csv
"""

import argparse
from pathlib import Path

from boltlm.errors import run_main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--params", "--work", "--timings", "--out", "--csv"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from boltlm.preflight.check import check_params

    check_params(args.params)
    from boltlm.params import load_settings
    from boltlm.shard_store import repository_path
    from boltlm.timing import timing_path
    from boltlm.training.base import BaseSettings, run_base

    run_base(
        load_settings(BaseSettings, args.params),
        work=repository_path(args.work),
        out=args.out,
        csv_path=args.csv,
        timing_path=timing_path(repository_path(args.timings), "train", "base"),
    )


if __name__ == "__main__":
    run_main(main)
