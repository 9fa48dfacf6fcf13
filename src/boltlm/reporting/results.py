"""The numbers of the whole experiment, read from the metrics folder; missing files are skipped.

    <metrics>/eval/<model>.json   <metrics>/train/<model>.json   <metrics>/train/<model>.csv
    <metrics>/latents/<entry>.json   <metrics>/finetune/<run>.json   <metrics>/curves/<model>.csv
    <metrics>/seeds/means.csv

Only the entries of params.yaml are read: files that another preset left behind are not part of the
experiment. Wall-clock figures lie outside the metrics folder, because they differ between runs of
the same experiment; they are logged to MLflow and appear in no tracked file.
"""

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from boltlm.evaluation.curve_points import CurvePoint, read_curves
from boltlm.reporting.arms import BASE_MODEL, Arm, ReportSettings, experiment_arms
from boltlm.timing import read_timing, timing_path

Metrics = Mapping[str, float]


DAGGER, DOUBLE_DAGGER = "†", "‡"
HIGH_FORCED = 0.05  # of the draws of a bound, cut at the limit


class MetricPoint(NamedTuple):
    """One value of a metric, as MLflow logs it."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A metric and its standard error, None if the metric has none."""

    value: float
    se: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """What is known of an experiment; values that are null or text are not included.

    `evaluation` is keyed by model, `training` (tokens and FLOPs) by model and by parent model, and
    `finetuning` by run of `finetune`, whose models are `finetune_models`. `diagnostics`,
    `generators` (the model that sampled the latents) and `histograms` (bins of their log w) are
    keyed by entry of `latents`. `curves` holds the lines of the training curves, keyed by model and
    by parent model, `snapshot_curves` the evaluated snapshots of each entry of `curves`. `timings`
    holds measured wall-clock figures, keyed by model and by `latents/<entry>`: one mapping for each
    line of a training curve, one in all for latents. `means` are the lines of metrics/seeds, as
    text.
    """

    arms: tuple[Arm, ...]
    evaluation: Mapping[str, Metrics]
    training: Mapping[str, Metrics]
    finetuning: Mapping[str, Metrics]
    finetune_models: Mapping[str, str]
    diagnostics: Mapping[str, Metrics]
    generators: Mapping[str, str]
    curves: Mapping[str, Sequence[Metrics]]
    snapshot_curves: Mapping[str, Sequence[CurvePoint]]
    histograms: Mapping[str, Sequence[Metrics]]
    timings: Mapping[str, Sequence[Metrics]]
    means: Sequence[Mapping[str, str]]

    def estimate(self, model: str, metric: str) -> Estimate | None:
        """An evaluation metric of a model, or None if the model does not have it."""
        metrics = self.evaluation[model]
        if metric not in metrics:
            return None
        return Estimate(value=metrics[metric], se=metrics.get(f"{metric}_se"))

    def doubt(self, model: str, metric: str) -> str:
        """A mark for a value that should not be believed as it stands: DAGGER for a bound with many
        draws that were cut at the limit, DOUBLE_DAGGER for one cluster, which gives no error;
        empty for all others."""
        metrics = self.evaluation.get(model, {})
        prefix, _, last = metric.rpartition("/")
        where = f"{prefix}/" if prefix else ""
        clusters = "clusters" if last == "accuracy" else "heldout_clusters"
        if metrics.get(f"{where}{clusters}", 2) < 2:
            return DOUBLE_DAGGER
        is_bound = last.startswith(("elbo", "utility", "simplicity", "diversity"))
        forced = metrics.get(f"{where}forced_fraction", metrics.get("forced_fraction", 0))
        return DAGGER if is_bound and forced > HIGH_FORCED else ""

    def tasks(self) -> list[str]:
        """The tasks that have an accuracy, without those on the corpus's own questions."""
        keys = dict.fromkeys(key for metrics in self.evaluation.values() for key in metrics)
        tasks = [key.removesuffix("/accuracy") for key in keys if key.endswith("/accuracy")]
        return [task for task in tasks if not task.startswith("questions/")]

    def subjects(self, accuracy: str) -> list[str]:
        """The metrics that give an accuracy by subject, sorted."""
        prefix = f"{accuracy}_by_subject/"
        keys = {key for metrics in self.evaluation.values() for key in metrics}
        return sorted(k for k in keys if k.startswith(prefix) and not k.endswith("_se"))

    def bound_sizes(self, prefix: str = "") -> list[int]:
        """Every K for which some model has an importance-weighted bound, in ascending order;
        `prefix` is that of the metrics' names."""
        keys = {key for metrics in self.evaluation.values() for key in metrics}
        matches = (re.fullmatch(rf"{prefix}elbo_per_token_k(\d+)", key) for key in keys)
        return sorted(int(match[1]) for match in matches if match)


def read_results(settings: ReportSettings, metrics: Path, timings: Path | None = None) -> Results:
    """The results in the folder `metrics`. `timings`: the folder of the wall-clock figures, of
    which those that belong to a different metrics file are ignored; None: they are not read."""
    arms = experiment_arms(settings)
    models = list(settings.models)
    parents = [settings.models[name].parent for name in models]
    trained = list(dict.fromkeys([name for name in parents if name not in models] + models))
    curve_paths = {name: metrics / "train" / f"{name}.csv" for name in trained}
    latents_paths = {name: metrics / "latents" / f"{name}.json" for name in settings.latents}
    return Results(
        arms=arms,
        evaluation={
            name: _read_json(metrics / "eval" / f"{name}.json") for name in (*models, BASE_MODEL)
        },
        training={
            name: _read_json(path.with_suffix(".json")) for name, path in curve_paths.items()
        },
        finetuning={
            name: _read_json(metrics / "finetune" / f"{name}.json")
            for name in settings.finetune_runs
        },
        finetune_models={name: run.model for name, run in settings.finetune_runs.items()},
        diagnostics={name: _read_json(path) for name, path in latents_paths.items()},
        generators={name: entry.model for name, entry in settings.latents.items()},
        curves={name: _read_csv(path) for name, path in curve_paths.items()},
        snapshot_curves={
            name: read_curves(metrics / "curves" / f"{name}.csv") for name in settings.curves
        },
        histograms={
            name: _read_csv(path.with_suffix(".csv")) for name, path in latents_paths.items()
        },
        timings={} if timings is None else _read_timings(timings, curve_paths, latents_paths),
        means=_read_lines(metrics / "seeds" / "means.csv"),
    )


def run_points(results: Results) -> dict[str, list[MetricPoint]]:
    """The points of each part of the experiment: of a model its training curve, the totals of its
    training and its evaluation, of `curves/<model>` those of its snapshots, of `finetune/<run>` the
    metrics of that run, of `latents/<entry>` the diagnostics of those latents; with each part the
    wall-clock figures measured for it."""
    points: dict[str, list[MetricPoint]] = {}
    for model, lines in results.curves.items():
        totals = [results.training[model], results.evaluation.get(model, {})]
        points[model] = _points(lines) + _points(totals)
    for model, curve in results.snapshot_curves.items():
        points[f"curves/{model}"] = [
            MetricPoint(point.metric, point.value, point.step)
            for point in curve
            if point.value is not None
        ]
    for run, metrics in results.finetuning.items():
        points[f"finetune/{run}"] = _points([metrics])
    for entry, diagnostics in results.diagnostics.items():
        points[f"latents/{entry}"] = _points([diagnostics])
    for part, lines in results.timings.items():
        points[part] += _points(lines)
    return points


def _points(lines: Iterable[Metrics]) -> list[MetricPoint]:
    """One point for each value, at the step that its line names, else at step 0."""
    return [
        MetricPoint(metric, value, int(line.get("step", 0)))
        for line in lines
        for metric, value in line.items()
        if metric != "step"
    ]


def _read_timings(
    folder: Path, curves: Mapping[str, Path], latents: Mapping[str, Path]
) -> dict[str, Sequence[Metrics]]:
    """The wall-clock figures that belong to these very training curves and diagnostics."""
    train = {
        name: read_timing(timing_path(folder, "train", name), path) for name, path in curves.items()
    }
    estep = {
        f"latents/{name}": read_timing(timing_path(folder, "latents", name), path)
        for name, path in latents.items()
    }
    return {**train, **estep}


def _read_json(path: Path) -> Metrics:
    if not path.exists():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _read_csv(path: Path) -> list[Metrics]:
    return [
        {key: float(value) for key, value in line.items() if value} for line in _read_lines(path)
    ]


def _read_lines(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
