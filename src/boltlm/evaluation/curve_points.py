"""The points of evaluation curves over training: their table, and a summary of it."""

import csv
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from boltlm.shard_store import atomic_write

# The metrics that have a better and a worse, by the last part of their names: 1 for those of which
# more is better, −1 for the others. Counts, the parts of the bound and the like are not here.
_DIRECTIONS = {
    "elbo_per_token": 1,
    "elbo_k1_per_document": 1,
    "accuracy": 1,
    "nll_per_token": -1,
    "nll_in_context_per_token": -1,
    "exact_match": 1,
    "numbers_match": 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """A metric of one snapshot and its standard error, None where it has none or is not finite.
    `step`, `tokens`: of the training, as in its own curve; `raw_tokens`: how many tokens of raw
    text it had seen (`boltlm.sequences.raw_counts`)."""

    step: int
    tokens: int
    raw_tokens: int
    metric: str
    value: float | None
    se: float | None


def metric_direction(metric: str) -> int:
    """1 if more of a metric is better, −1 if less is, 0 if it is neither."""
    if "/accuracy_by_subject/" in metric or "/accuracy_by_level/" in metric:
        return 1
    name = metric.rpartition("/")[2].removesuffix("_selected")
    return _DIRECTIONS.get("elbo_per_token" if name.startswith("elbo_per_token_k") else name, 0)


def summarize_curves(points: Sequence[CurvePoint]) -> dict[str, dict[str, float]]:
    """For each metric that has a better and a worse: its value in the last snapshot (`last`), the
    best one with the first step that has it (`best`, `best_step`) and, where the likelihood of raw
    text was measured, the value where that is best (`at_best_nll`): early stopping."""
    by_metric: dict[str, dict[int, float]] = {}
    for point in points:
        if metric_direction(point.metric) and point.value is not None:
            by_metric.setdefault(point.metric, {})[point.step] = point.value
    nlls = by_metric.get("nll_per_token", {})
    stop_step = min(nlls, key=nlls.__getitem__, default=None)
    summary: dict[str, dict[str, float]] = {}
    for metric, values in by_metric.items():
        sign = metric_direction(metric)
        best_step = max(values, key=lambda step, values=values, sign=sign: sign * values[step])
        best = {"best": values[best_step], "best_step": best_step}
        summary[metric] = {"last": values[max(values)], **best}
        if stop_step in values:
            summary[metric]["at_best_nll"] = values[stop_step]
    return summary


def write_curves(path: Path, points: Sequence[CurvePoint]) -> None:
    """Write a CSV file with a line for each point, completely or not at all; a missing number is
    left blank."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(CurvePoint)])
        writer.writerows(["" if v is None else v for v in astuple(point)] for point in points)


def read_curves(path: Path) -> list[CurvePoint]:
    """What `write_curves` wrote; nothing where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return [
        CurvePoint(
            step=int(line["step"]),
            tokens=int(line["tokens"]),
            raw_tokens=int(line["raw_tokens"]),
            metric=line["metric"],
            value=_number(line["value"]),
            se=_number(line["se"]),
        )
        for line in lines
    ]


def _number(text: str) -> float | None:
    return float(text) if text and math.isfinite(float(text)) else None
