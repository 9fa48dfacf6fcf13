"""Writes the numbers and pictures of the whole experiment to MLflow.

    python stages/track.py --params params.yaml --metrics metrics --figures metrics/figures \
        --db mlflow.db --artifacts mlartifacts

The database and the folder of artifacts lie in the real repository also when DVC runs a queued
experiment in a copy. MLFLOW_TRACKING_URI names another store. To look: mlflow ui.
"""

import argparse
from pathlib import Path

from boltlm import tracking
from boltlm.engine import work_root
from boltlm.errors import stage
from boltlm.figures.results import parts, points, read
from boltlm.params import load


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--params", "--metrics", "--figures", "--db", "--artifacts"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    params = load(args.params)
    results = read(params, args.metrics)
    experiment = tracking.Experiment(
        params=params,
        points=points(results),
        parts=parts(results),
        files=[args.params],
        folders=[args.figures],
    )
    tracking.log(experiment, tracking.store(work_root(args.db), work_root(args.artifacts)))


if __name__ == "__main__":
    stage(main)
