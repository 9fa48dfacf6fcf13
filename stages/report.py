"""Writes the results of the whole experiment, with a latent browser, to one HTML page.

    python stages/report.py --params params.yaml --metrics metrics --figures metrics/figures \
        --timings timings --lock dvc.lock --data data --models models --out reports \
        --marker report.written

The page, reports/<experiment>/index.html, belongs to the repository itself also when DVC runs a
queued experiment in a copy of it. It has wall-clock figures, so it is neither in git nor hashed;
the marker says that it was written.
"""

import argparse
from pathlib import Path

from boltlm.errors import run_main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("params", "metrics", "figures", "timings", "lock", "data", "models", "out"):
        parser.add_argument(f"--{flag}", type=Path, required=True)
    parser.add_argument("--marker", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from boltlm.preflight.check import check_params

    check_params(args.params)
    from boltlm.params import load_settings
    from boltlm.reporting import html_report  # imports torch, which --help need not
    from boltlm.reporting.experiment_identity import report_path
    from boltlm.reporting.html_config import HtmlReportSettings
    from boltlm.shard_store import repository_path

    settings = load_settings(HtmlReportSettings, args.params)
    paths = html_report.ExperimentPaths(
        metrics=args.metrics,
        figures=args.figures,
        timings=repository_path(args.timings),
        lock=args.lock,
        data=args.data,
        models=args.models,
    )
    out = report_path(repository_path(args.out))
    html_report.write_html_report(settings, paths, out)
    args.marker.write_text("written\n", encoding="utf-8")
    print(f"report: {out}")


if __name__ == "__main__":
    run_main(main)
