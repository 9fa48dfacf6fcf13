"""Logs the numbers, figures and the page of the whole experiment to MLflow.

    python stages/track.py --params params.yaml --presets presets --metrics metrics \
        --figures metrics/figures --timings timings --lock dvc.lock --reports reports \
        --db mlflow.db --artifacts mlartifacts

The database and the artifacts are those of the repository itself also when DVC runs a queued
experiment in a copy. MLFLOW_TRACKING_URI names another store; a server that does not answer costs
a warning and no error. To look at the runs: make ui.
"""

import argparse
import sys
from pathlib import Path

from boltlm.errors import run_main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    inputs = ("params", "presets", "metrics", "figures", "timings", "lock", "reports")
    for flag in (*inputs, "db", "artifacts"):
        parser.add_argument(f"--{flag}", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    import yaml

    from boltlm.params import build_settings, flatten_params, load
    from boltlm.reporting.arms import ReportSettings
    from boltlm.reporting.experiment_identity import (
        COMMITTED,
        committed_text,
        nearest_preset,
        report_path,
    )
    from boltlm.reporting.experiment_record import TrackedFiles, experiment_record
    from boltlm.reporting.mlflow_store import TrackingServerError, tracking_store
    from boltlm.reporting.mlflow_tracking import log_experiment
    from boltlm.shard_store import repository_path

    params, flat = load(args.params), flatten_params(load(args.params))
    presets = {path.stem: load(path) for path in sorted(args.presets.glob("*.yaml"))}
    if (text := committed_text(args.params)) is not None:
        presets[COMMITTED] = yaml.safe_load(text)
    preset = nearest_preset(flat, {name: flatten_params(p) for name, p in presets.items()})
    page, timings = report_path(repository_path(args.reports)), repository_path(args.timings)
    files = TrackedFiles(args.params, args.metrics, args.figures, timings, args.lock, page)
    record = experiment_record(build_settings(ReportSettings, params), flat, preset, files)
    store = tracking_store(repository_path(args.db), repository_path(args.artifacts))
    try:
        log_experiment(record, store)
    except TrackingServerError as error:
        print(f"warning: {error}; the next dvc repro logs this experiment", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
