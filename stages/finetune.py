"""Fine-tunes a model on questions with thoughts and evaluates it on held-out questions.

    python stages/finetune.py --params params.yaml --name em1 --model models/em1 \
        --split data/split --data data/split/warmstart --work .work --out data/finetune/em1 \
        --metrics metrics/finetune/em1.json
"""

import argparse
from pathlib import Path

from boltlm.errors import run_main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    for flag in ("--params", "--model", "--split", "--data", "--work", "--out", "--metrics"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from boltlm.preflight.check import check_params

    check_params(args.params)
    from boltlm.evaluation.finetune import FinetunePaths, run_finetuning
    from boltlm.evaluation.finetune_config import FinetuneSettings
    from boltlm.params import load_settings
    from boltlm.records import write_json
    from boltlm.shard_store import repository_path

    settings = load_settings(FinetuneSettings, args.params, name=args.name)
    work = repository_path(args.work)
    paths = FinetunePaths(args.model, args.split, args.data, work, args.out)
    write_json(args.metrics, run_finetuning(settings, paths))


if __name__ == "__main__":
    run_main(main)
