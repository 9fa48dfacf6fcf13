"""What a panel of a figure shows: a quantity of each model, its value with an error, its curve.

Several metrics can be one quantity, because not every model has each: the accuracy of a task is
that with a latent thought where there are latents, else that of plain text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from boltlm.evaluation.curve_points import CurvePoint
from boltlm.reporting.arms import Arm, ordered_arms
from boltlm.reporting.metric_names import FRACTION, TASK_LABELS, describe_metric
from boltlm.reporting.results import HIGH_FORCED, Results

SPACES = ("latent", "cot", "raw")  # in which the answer is looked for, the first that a model has


@dataclass(frozen=True, slots=True)
class Quantity:
    """`label` is the title of a panel, `axis_label` that of its axis; `direction`: as in
    `MetricInfo`; `metrics`: the first that a model has is taken, with the sign."""

    label: str
    unit: str
    direction: int
    metrics: tuple[tuple[str, int], ...]

    @property
    def axis_label(self) -> str:
        """The unit; fractions are drawn in percent."""
        is_accuracy = self.metrics[0][0].endswith("/accuracy")
        return f"{'accuracy, ' * is_accuracy}%" if self.unit == FRACTION else self.unit


class Value(NamedTuple):
    """A value, its standard error (None: it has none), the number of trainings that it is the mean
    of, the metric that it is, and whether it is in doubt (`Results.doubt`)."""

    value: float
    error: float | None
    trainings: int
    metric: str
    is_doubtful: bool


class CurveValue(NamedTuple):
    """The value after `tokens` training tokens and `raw_tokens` tokens of raw text."""

    tokens: float
    raw_tokens: float
    measured: Value


def of_metric(metric: str) -> Quantity:
    """The quantity that is one metric."""
    info = describe_metric(metric)
    return Quantity(info.label, info.unit, info.direction, ((metric, 1),))


def likelihood(corpus: str = "") -> Quantity:
    """The bound on log p(X | C), for models without latents log p(X | C) itself."""
    prefix = f"{corpus}/" if corpus else ""
    metrics = ((f"{prefix}elbo_per_token", 1), (f"{prefix}nll_in_context_per_token", -1))
    return Quantity(f"ELBO on {corpus or 'held-out text'}", "nats per token", 1, metrics)


def raw_likelihood(corpus: str = "") -> Quantity:
    """The NLL of the raw text."""
    metric = f"{corpus}/nll_per_token" if corpus else "nll_per_token"
    return Quantity(f"NLL of {corpus or 'held-out'} text", "nats per token", -1, ((metric, 1),))


def accuracy(task: str, prompts: str) -> Quantity:
    """The accuracy of a task with the prompt set."""
    metrics = tuple((f"{task}/{prompts}/{space}/accuracy", 1) for space in SPACES)
    label = TASK_LABELS.get(task, task)
    label += "" if task == "questions" else f", {prompts} prompts"
    return Quantity(label, FRACTION, 1, metrics)


def accuracies(results: Results, prompts: str) -> list[Quantity]:
    """Of every task that some model, or some snapshot, was measured on."""
    names = {key for metrics in results.evaluation.values() for key in metrics}
    names |= {point.metric for points in results.snapshot_curves.values() for point in points}
    parts = [name.split("/") for name in names if name.endswith("/accuracy")]
    tasks = {part[0] for part in parts if len(part) == 4 and part[1] == prompts}
    order = list(TASK_LABELS)
    return [accuracy(task, prompts) for task in sorted(tasks, key=order.index)]


def general_corpora(results: Results) -> list[str]:
    """The further held-out corpora (`evaluate.extra_corpora`)."""
    names = {key for metrics in results.evaluation.values() for key in metrics}
    names |= {point.metric for points in results.snapshot_curves.values() for point in points}
    corpora = {name.partition("/")[0] for name in names if name.endswith("/nll_per_token")}
    return sorted(corpora - {"subset"})


def shown_arms(results: Results) -> list[Arm]:
    """The models in the order of every legend; other trainings of a model are part of its value."""
    return [arm for arm in ordered_arms(results.arms) if arm.training_of is None]


def value_of_arm(results: Results, arm: Arm, quantity: Quantity) -> Value | None:
    """The quantity of a model; over several trainings their mean with its standard error, else the
    value with the standard error over clusters."""
    for metric, sign in quantity.metrics:
        models = [
            arm.name,
            *(other.name for other in results.arms if other.training_of == arm.name),
        ]
        estimates = [e for name in models if (e := results.estimate(name, metric)) is not None]
        if estimates:
            values = [sign * estimate.value for estimate in estimates]
            doubtful = any(results.doubt(name, metric) for name in models)
            mean, error = _pooled(values, estimates[0].se)
            return Value(mean, error, len(values), metric, doubtful)
    return None


def curve_of_arm(results: Results, arm: Arm, quantity: Quantity) -> list[CurveValue]:
    """The quantity of every snapshot that all trainings of a model have, as `value_of_arm`."""
    models = _trainings(results, arm)
    curves = [points for name in models if (points := results.snapshot_curves.get(name))]
    for metric, sign in quantity.metrics:
        by_step = [_by_step(points, metric) for points in curves]
        by_step = [points for points in by_step if points]
        if by_step:
            forced = [_by_step(points, "forced_fraction") for points in curves]
            steps = sorted(set.intersection(*map(set, by_step)))
            return [_curve_value(by_step, forced, step, metric, sign) for step in steps]
    return []


def _curve_value(
    curves: Sequence[Mapping[int, CurvePoint]],
    forced: Sequence[Mapping[int, CurvePoint]],
    step: int,
    metric: str,
    sign: int,
) -> CurveValue:
    points = [curve[step] for curve in curves]
    mean, error = _pooled([sign * (point.value or 0.0) for point in points], points[0].se)
    cut = [point.value or 0.0 for curve in forced if (point := curve.get(step)) is not None]
    doubtful = "elbo" in metric and max(cut, default=0.0) > HIGH_FORCED
    return CurveValue(
        tokens=float(np.mean([point.tokens for point in points])),
        raw_tokens=float(np.mean([point.raw_tokens for point in points])),
        measured=Value(mean, error, len(points), metric, doubtful),
    )


def best_so_far(curve: Sequence[CurveValue], direction: int) -> list[CurveValue]:
    """At each snapshot the best value up to it, with the error of that value."""
    best: list[CurveValue] = []
    for point in curve:
        last = best[-1].measured if best else point.measured
        is_better = direction * (point.measured.value - last.value) >= 0
        best.append(point._replace(measured=point.measured if is_better else last))
    return best


def _trainings(results: Results, arm: Arm) -> list[str]:
    return [arm.name, *(other.name for other in results.arms if other.training_of == arm.name)]


def _by_step(points: Sequence[CurvePoint], metric: str) -> dict[int, CurvePoint]:
    return {p.step: p for p in points if p.metric == metric and p.value is not None}


def _pooled(values: Sequence[float], error: float | None) -> tuple[float, float | None]:
    """Mean and standard error over trainings; of one, the value and its own error."""
    if len(values) < 2:
        return values[0], error
    return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
