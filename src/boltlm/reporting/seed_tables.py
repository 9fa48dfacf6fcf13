"""The files of the aggregation over seeds: the rows that `boltlm seeds` collects, and the means
that the stage `seeds` makes of them and of the trainings in its own experiment
(docs/reporting.md)."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from boltlm.errors import UserError
from boltlm.param_types import NonNegativeInt
from boltlm.reporting.arms import ReportSettings
from boltlm.reporting.metric_names import describe_metric
from boltlm.reporting.seed_aggregation import (
    INTERVAL_NOTE,
    SeedGroup,
    mean_over_seeds,
    metric_names,
    paired_by_seed,
    paired_table,
    pairs_with,
    seed_groups,
    seed_table,
    values_of,
)
from boltlm.reporting.seed_rows import SeedRow, Seeds, first_training, metric_parts, select_metrics
from boltlm.shard_store import atomic_write

BETTER = {1: "higher", -1: "lower", 0: ""}
OWN = "experiment"  # the source of the rows of the present experiment
_VARYING = {"replicates": 0, "seeds": 1, "trainings": 2}  # which of the Seeds differ


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedsConfig:
    """Params section `seeds`. `collected`: names of files in metrics/collected; `metrics`: patterns
    of names; `baseline`: the model from which differences are taken, None: none."""

    collected: tuple[str, ...]
    metrics: tuple[str, ...]
    baseline: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectSettings:
    """Settings of `boltlm seeds`."""

    seeds: SeedsConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedsSettings(ReportSettings):
    """Settings of the stage `seeds`."""

    data_seed: NonNegativeInt
    seed: NonNegativeInt
    seeds: SeedsConfig


def aggregate_experiment(
    settings: SeedsSettings, metrics: Path, collected: Path, out: Path
) -> None:
    """Write `out`/means.csv and `out`/report.md from this experiment and from the files in
    `collected` that the settings name. The report names a file that is not there yet, and rows
    that contradict this experiment."""
    own = _own_rows(settings, metrics)
    groups, notes = seed_groups(OWN, own), list[str]()
    for name in settings.seeds.collected:
        path = collected / f"{name}.csv"
        if not path.is_file():
            notes.append(f"`{path.name}` is not there yet: run `boltlm seeds --out {path}`.")
            continue
        rows = [
            replace(row, metrics=select_metrics(row.metrics, settings.seeds.metrics))
            for row in read_seed_rows(path)
        ]
        groups += seed_groups(name, rows)
        notes += _conflicts(path.name, rows, own)
    repeated = [group for group in groups if len(group.rows) > 1]
    out.mkdir(parents=True, exist_ok=True)
    write_means(out / "means.csv", groups, settings.seeds.baseline)
    text = ["# Means over seeds", f"{INTERVAL_NOTE.capitalize()}.", *notes]
    text += [seed_table(repeated)] if repeated else ["Nothing was repeated with other seeds."]
    differences = paired_table(groups, pairs_with(groups, settings.seeds.baseline), min_seeds=2)
    text += [differences] if differences else []
    (out / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def _own_rows(settings: SeedsSettings, metrics: Path) -> list[SeedRow]:
    """The parts of this experiment. Their params are its own, so they are one group."""
    experiment = {
        "models": {name: asdict(entry) for name, entry in settings.models.items()},
        "finetune": {"runs": {name: asdict(run) for name, run in settings.finetune_runs.items()}},
        "latents": settings.latents,
        "teachers": settings.teachers,
    }
    rows: list[SeedRow] = []
    for file, part in metric_parts(experiment):
        path = metrics / file
        if path.is_file():
            first, own = first_training(experiment, part)
            seeds = Seeds(settings.data_seed, settings.seed, settings.seed if own is None else own)
            values = json.loads(path.read_text(encoding="utf-8"))
            chosen = select_metrics(values, settings.seeds.metrics)
            rows.append(SeedRow(group="", model=first, seeds=seeds, metrics=chosen))
    return rows


def _conflicts(file: str, rows: Sequence[SeedRow], own: Sequence[SeedRow]) -> list[str]:
    """Collected rows that have the seeds of this experiment and other values."""
    known = {row.key: row.metrics for row in own}
    models = [
        row.model
        for row in rows
        if row.key in known
        if any(known[row.key].get(name, value) != value for name, value in row.metrics.items())
    ]
    if not models:
        return []
    note = f"`{file}` has other values of {', '.join(models)} than this experiment has with the"
    return [f"**{note} same seeds: it was collected from other params, code or machines.**"]


def write_seed_rows(path: Path, rows: Sequence[SeedRow]) -> None:
    """Write the rows as CSV, a column for each metric; what a part does not have is blank."""
    metrics = sorted({name for row in rows for name in row.metrics})
    lines = [
        {"group": row.group, "model": row.model, **row.seeds._asdict(), **row.metrics}
        for row in rows
    ]
    _write_csv(path, ["group", "model", *Seeds._fields, *metrics], lines)


def read_seed_rows(path: Path) -> list[SeedRow]:
    """What `write_seed_rows` wrote. Raises UserError where the file does not have its columns."""
    lines = read_lines(path)
    keys = {"group", "model", *Seeds._fields}
    if lines and not keys <= lines[0].keys():
        missing = ", ".join(sorted(keys - lines[0].keys()))
        raise UserError(f"{path}: not a table of boltlm seeds; it has no column {missing}")
    return [
        SeedRow(
            group=line["group"],
            model=line["model"],
            seeds=Seeds(*(int(line[field]) for field in Seeds._fields)),
            metrics={key: float(text) for key, text in line.items() if key not in keys and text},
        )
        for line in lines
    ]


def write_means(path: Path, groups: Sequence[SeedGroup], baseline: str | None) -> None:
    """The CSV in long form, a line for each metric of each group that was collected or has several
    trainings. `low` and `high` end the 95 % interval of the mean, `difference_low` and
    `difference_high` that of the difference to the baseline, over `pairs` seeds. `seeds` are those
    that differ; `values` belong to them in their order."""
    lines: list[dict[str, Any]] = []
    for group in groups:
        for metric in metric_names([group]):
            rows = [row for row in group.rows if metric in row.metrics]
            if len(rows) < 2 and group.source == OWN:
                continue  # it is in metrics/eval, with its error
            info, values = describe_metric(metric), values_of(rows, metric)
            gaps: list[float] = []
            if baseline not in (None, group.model) and info.direction:
                gaps = paired_by_seed(group, baseline, groups, metric)
            line = {"source": group.source, "group": group.group, "model": group.model}
            line |= {"metric": metric, "unit": info.unit, "better": BETTER[info.direction]}
            varying = _VARYING.get(group.over, 1)
            seeds = " ".join(str(row.seeds[varying]) for row in rows)
            line |= {"over": group.over, "seeds": seeds, "n": len(rows)}
            line |= _interval(("mean", "se", "low", "high"), values)
            line |= {"baseline": baseline if gaps else "", "pairs": len(gaps)}
            ends = ("difference_se", "difference_low", "difference_high")
            line |= _interval(("difference", *ends), gaps)
            lines.append(line | {"values": " ".join(map(repr, values))})
    head = list(lines[0]) if lines else ["source", "group", "model", "metric", "n", "mean"]
    _write_csv(path, head, lines)


def read_lines(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file with a head."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _interval(names: Sequence[str], values: Sequence[float]) -> dict[str, float | str]:
    """Mean, standard error, and ends of the 95 % interval; blank where they do not exist."""
    if not values:
        return dict.fromkeys(names, "")
    mean, error, half = mean_over_seeds(values)
    numbers = (mean, error, mean - half, mean + half)
    return {k: "" if math.isnan(v) else v for k, v in zip(names, numbers, strict=True)}


def _write_csv(path: Path, head: Sequence[str], lines: Sequence[dict[str, Any]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, head, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
