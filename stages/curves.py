"""Evaluates the snapshots of a training: its curves of bounds, likelihoods and accuracies.

    python stages/curves.py --params params.yaml --name em1 --snapshots snapshots/em1 \
        --split data/split --chunks data/chunks --fewshot src/boltlm/evaluation/fewshot.yaml \
        --work .work --csv metrics/curves/em1.csv --metrics metrics/curves/em1.json
"""

import argparse
from pathlib import Path

from boltlm.errors import run_main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    inputs = ("--params", "--snapshots", "--split", "--chunks", "--fewshot")
    for flag in (*inputs, "--work", "--csv", "--metrics"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from boltlm.preflight.check import check_params

    check_params(args.params)
    from boltlm.evaluation.config import CurveSettings
    from boltlm.evaluation.curve_points import summarize_curves, write_curves
    from boltlm.evaluation.snapshot_curves import CurvePaths, measure_curves
    from boltlm.params import load_settings
    from boltlm.records import write_json
    from boltlm.shard_store import repository_path

    settings = load_settings(CurveSettings, args.params, name=args.name)
    work = repository_path(args.work)
    paths = CurvePaths(args.snapshots, args.split, args.chunks, args.fewshot, work)
    points = measure_curves(settings, paths)
    write_curves(args.csv, points)
    write_json(args.metrics, summarize_curves(points))


if __name__ == "__main__":
    run_main(main)
