"""Evaluates a model: likelihood bounds, raw-text likelihood, and answers to questions.

    python stages/evaluate.py --params params.yaml --name em1 --model models/em1 \
        --split data/split --chunks data/chunks --fewshot src/boltlm/evaluation/fewshot.yaml \
        --work .work --out data/evaluate/em1 --metrics metrics/eval/em1.json

The name `base` stands for the model of the stage `base`.
"""

import argparse
from pathlib import Path

from boltlm.errors import run_main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    inputs = ("--params", "--model", "--split", "--chunks", "--fewshot")
    for flag in (*inputs, "--work", "--out", "--metrics"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from boltlm.preflight.check import check_params

    check_params(args.params)
    from boltlm.evaluation.config import BaseEvaluateSettings, EvaluateSettings
    from boltlm.evaluation.run import EvaluationPaths, evaluate_model
    from boltlm.params import load_settings
    from boltlm.records import write_json
    from boltlm.shard_store import repository_path

    kind = BaseEvaluateSettings if args.name == "base" else EvaluateSettings
    settings = load_settings(kind, args.params, name=args.name)
    work = repository_path(args.work)
    paths = EvaluationPaths(args.model, args.split, args.chunks, args.fewshot, work, args.out)
    write_json(args.metrics, evaluate_model(settings, paths))


if __name__ == "__main__":
    run_main(main)
