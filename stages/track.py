"""Logs the numbers and figures of the whole experiment to MLflow.

    python stages/track.py --params params.yaml --metrics metrics --timings timings \
        --figures metrics/figures --db mlflow.db --artifacts mlartifacts --marker mlflow.logged

The database and the artifact folder belong to the repository itself also when DVC runs a queued
experiment in a copy of it; the marker says that the results of this workspace were logged.
MLFLOW_TRACKING_URI names another store. To look at the runs: make ui.
"""

import argparse
from pathlib import Path

from boltlm.errors import run_main
from boltlm.params import build_settings, flatten_params, load
from boltlm.reporting import mlflow_tracking
from boltlm.reporting.arms import ReportSettings
from boltlm.reporting.results import experiment_points, read_results, run_points
from boltlm.shard_store import repository_path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("params", "metrics", "timings", "figures", "db", "artifacts", "marker"):
        parser.add_argument(f"--{flag}", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    params = load(args.params)
    settings = build_settings(ReportSettings, params)
    results = read_results(settings, args.metrics, repository_path(args.timings))
    record = mlflow_tracking.ExperimentRecord(
        params=flatten_params(params),
        points=experiment_points(results),
        parts=run_points(results),
        files=[args.params],
        folders=[args.figures],
    )
    store = mlflow_tracking.tracking_store(
        repository_path(args.db), repository_path(args.artifacts)
    )
    mlflow_tracking.log_experiment(record, store)
    args.marker.write_text("logged\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
