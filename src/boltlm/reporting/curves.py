"""Curves over training (losses, validation, evaluated snapshots), and the distribution of the
importance weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from boltlm.reporting.arms import Arm, em_chain
from boltlm.reporting.plotting import (
    GREY,
    LineStyle,
    Plot,
    PlotRows,
    SkippedPlot,
    add_legend,
    draw_band,
    line_styles,
    panels,
    token_axis,
    value_axis,
)
from boltlm.reporting.quantities import (
    CurveValue,
    Quantity,
    best_so_far,
    curve_of_arm,
    of_metric,
    shown_arms,
)
from boltlm.reporting.results import Metrics, Results

TOKEN_LABELS = {"tokens": "training tokens", "raw_tokens": "raw tokens seen"}
SHOWN = {"exact": "each snapshot", "best": "best so far"}
TAIL_FRACTION = 0.001  # of the weights, cut off by the axis at each end
MAX_BINS = 80  # of the histogram of log w in a figure
BEST_VALIDATION: Mapping[str, Callable[..., Any]] = {
    "val_elbo": np.maximum.accumulate,
    "val_nll": np.minimum.accumulate,
}  # columns of a training curve: the best value so far


def draw_curves(
    results: Results,
    quantities: Sequence[Quantity],
    *,
    x: str = "tokens",
    shows: Sequence[str] = ("best",),
    arms: Sequence[Arm] | None = None,
) -> Plot | SkippedPlot:
    """Evaluated snapshots, a column for each quantity and a row for each of `shows`, keys of SHOWN;
    `x`: a key of TOKEN_LABELS. Errors are bands: standard errors over trainings where there are
    several, else over clusters of documents or questions; of the best so far, that of the best."""
    arms = shown_arms(results) if arms is None else arms
    if not any(results.snapshot_curves.values()):
        return SkippedPlot("no snapshots were evaluated (`curves` in params.yaml)")
    quantities = [q for q in quantities if any(curve_of_arm(results, arm, q) for arm in arms)]
    if not quantities:
        return SkippedPlot("the snapshots have none of its metrics")
    figure, axes_RC = panels(len(quantities), len(shows))
    styles, rows = line_styles(results.arms), list[dict[str, Any]]()
    for column, quantity in enumerate(quantities):
        curves = {arm.name: curve_of_arm(results, arm, quantity) for arm in results.arms}
        for row, shown in enumerate(shows):
            axes = axes_RC[row, column]
            for arm in arms:
                if curve := curves[arm.name]:
                    rows += _curve(axes, arm, curve, quantity, x, shown, styles[arm.name])
            for arm in arms:
                _join_parent(axes, curves, arm, x, shown, quantity.direction)
            axes.margins(x=0.03)
            value_axis(axes, quantity, f", {SHOWN[shown]}")
            token_axis(axes, TOKEN_LABELS[x])
    add_legend(figure, list(axes_RC.flat), [legend_label(arm) for arm in arms])
    return Plot(figure, rows)


def legend_label(arm: Arm) -> str:
    """The name and the role of a model."""
    return f"{arm.name}: {arm.description}"


def _curve(
    axes: Axes,
    arm: Arm,
    curve: Sequence[CurveValue],
    quantity: Quantity,
    x: str,
    shown: str,
    style: LineStyle,
) -> PlotRows:
    """Draw one model; returns its rows of the CSV."""
    points = curve if shown == "exact" else best_so_far(curve, quantity.direction)
    xs = [getattr(point, x) for point in points]
    values = [point.measured.value for point in points]
    errors = [point.measured.error for point in points]
    draw_band(axes, xs, values, errors, style.color)
    axes.plot(xs, values, color=style.color, linestyle=style.dashes, label=legend_label(arm))
    doubtful = [i for i, point in enumerate(points) if point.measured.is_doubtful]
    axes.plot(
        [xs[i] for i in doubtful],
        [values[i] for i in doubtful],
        "o",
        color=style.color,
        markerfacecolor="white",
    )
    return [
        {
            "model": arm.name,
            "metric": point.measured.metric,
            "shown": shown,
            "tokens": round(point.tokens),
            "raw_tokens": round(point.raw_tokens),
            "value": point.measured.value,
            "se": point.measured.error,
            "n": point.measured.trainings,
            "doubtful": point.measured.is_doubtful,
        }
        for point in points
    ]


def _join_parent(
    axes: Axes,
    curves: Mapping[str, Sequence[CurveValue]],
    arm: Arm,
    x: str,
    shown: str,
    direction: int,
) -> None:
    """In a continual run, a thin line from the parent's last snapshot to the first of the model,
    whose tokens go on from there."""
    parent, curve = curves.get(arm.parent or "", ()), curves[arm.name]
    if not (parent and curve) or getattr(parent[-1], x) > getattr(curve[0], x):
        return
    if shown == "best":
        parent, curve = best_so_far(parent, direction), best_so_far(curve, direction)
    ends = (parent[-1], curve[0])
    axes.plot(
        [getattr(end, x) for end in ends],
        [end.measured.value for end in ends],
        color=GREY,
        linewidth=0.6,
        zorder=1,
    )


def plot_training(results: Results) -> Plot | SkippedPlot:
    """Training loss by tokens of every model that has a curve. Parent models that are not entries
    of `models` have a panel of their own, because they are trained on other text."""
    arms = {arm.name: arm for arm in shown_arms(results)}
    curves = {name: lines for name, lines in results.curves.items() if lines}
    parents = [name for name in curves if name not in arms or arms[name].role == "base"]
    parents = [name for name in parents if name not in {a.name for a in results.arms if a.parent}]
    models = [name for name in arms if name in curves and name not in parents]
    if not curves:
        return SkippedPlot("no model has a training curve")
    groups = [group for group in (parents, models) if group]
    figure, ((*columns,),) = panels(len(groups), width=4.2, height=3.4)
    styles = {name: LineStyle(GREY, "solid") for name in parents} | {
        name: style for name, style in line_styles(results.arms).items() if name not in parents
    }
    for axes, group in zip(columns, groups, strict=True):
        for name in group:
            tokens, loss = ([line[key] for line in curves[name]] for key in ("tokens", "loss"))
            label = legend_label(arms[name]) if name in models else f"{name}: parent of the others"
            style = styles[name]
            axes.plot(tokens, loss, color=style.color, linestyle=style.dashes, lw=1.3, label=label)
        late = [line["loss"] for name in group for line in _without_start(curves[name])]
        axes.set_ylim(top=max(late) + 0.6 * (max(late) - min(late)))
        axes.set_ylabel("training loss, nats per token")
        token_axis(axes, TOKEN_LABELS["tokens"])
    add_legend(figure, columns, [legend_label(arm) for arm in arms.values()])
    rows = [
        {"model": name, "step": line["step"], "tokens": line["tokens"], "loss": line["loss"]}
        for group in groups
        for name in group
        for line in curves[name]
    ]
    return Plot(figure, rows)


def _without_start(lines: Sequence[Metrics]) -> Sequence[Metrics]:
    """A curve without its first tenth, in which the loss falls from far above."""
    return lines[min(len(lines) // 10 + 1, len(lines) - 1) :]


def plot_validation(results: Results) -> Plot | SkippedPlot:
    """Held-out metrics by tokens of every model that was validated during training: the values as
    points, and the best value so far as a line. Validation measures no errors."""
    curves = {
        arm: [line for line in results.curves.get(arm.name, []) if BEST_VALIDATION.keys() & line]
        for arm in shown_arms(results)
    }
    curves = {arm: lines for arm, lines in curves.items() if lines}
    if not curves:
        return SkippedPlot("no model was validated during training (train.validation)")
    metrics = [m for m in BEST_VALIDATION if any(m in line for c in curves.values() for line in c)]
    figure, ((*columns,),) = panels(len(metrics), width=4.2, height=3.2)
    styles, rows = line_styles(results.arms), list[dict[str, Any]]()
    for axes, metric in zip(columns, metrics, strict=True):
        for arm, lines in curves.items():
            tokens = [line["tokens"] for line in lines if metric in line]
            values = [line[metric] for line in lines if metric in line]
            best = BEST_VALIDATION[metric](values) if values else []
            style = styles[arm.name]
            axes.plot(tokens, values, ".", color=style.color, markersize=4)
            line = {"color": style.color, "linestyle": style.dashes}
            axes.plot(tokens, best, **line, label=legend_label(arm))
            rows += [
                {"model": arm.name, "metric": metric, "tokens": t, "value": v, "best": float(b)}
                for t, v, b in zip(tokens, values, best, strict=True)
            ]
        value_axis(axes, of_metric(metric))
        token_axis(axes, TOKEN_LABELS["tokens"])
    add_legend(figure, columns, [legend_label(arm) for arm in curves])
    return Plot(figure, rows)


def plot_log_weight(results: Results) -> Plot | SkippedPlot:
    """The distribution of log w (docs/method.md, eq. (3)) in the latents that each iteration is
    trained on, in at most MAX_BINS bins; the axis cuts off 0.1 % of the draws at either end."""
    entries = {
        arm.latents: arm
        for arm in em_chain(results.arms)
        if arm.latents is not None and results.histograms.get(arm.latents)
    }
    if not entries:
        return SkippedPlot("no latents of an EM chain have a histogram of log w")
    styles = line_styles(results.arms)
    all_bins = [line for entry in entries for line in results.histograms[entry]]
    low, high = _central_range(all_bins)
    width = _bin_width(all_bins, high - low)
    figure, ((axes,),) = panels(1, width=5.4, height=3.2)
    rows: PlotRows = []
    for entry, arm in entries.items():
        counts = _rebinned(results.histograms[entry], width)
        total = sum(counts.values())
        indices = range(min(counts), max(counts) + 1)
        edges = [width * index for index in (*indices, indices[-1] + 1)]
        label = f"iteration {arm.iteration}, drawn by {arm.generator}"
        fractions = [counts.get(index, 0) / total for index in indices]
        axes.stairs(fractions, edges, color=styles[arm.name].color, linewidth=1.5, label=label)
        rows += [
            {"latents": entry, "from_nats": e, "to_nats": e + width, "count": counts.get(index, 0)}
            for index, e in zip(indices, edges, strict=False)
            if counts.get(index, 0)
        ]
    axes.set_xlim(low, high)
    axes.set_xlabel("log w = log p(Z) + log p(X | Z) − log q(Z | X), nats per chunk")
    axes.set_ylabel(f"fraction of draws per {width:g} nats")
    add_legend(figure, [axes], [])
    return Plot(figure, rows)


def _bin_width(bins: Sequence[Metrics], span: float) -> float:
    """1, 2 or 5 times a power of ten, or the width of the bins, so that the span has at most
    MAX_BINS."""
    own = min(line["to_nats"] - line["from_nats"] for line in bins)
    if span <= own * MAX_BINS:
        return own
    power = 10 ** math.floor(math.log10(span / MAX_BINS))
    return next(power * step for step in (1, 2, 5, 10) if span <= power * step * MAX_BINS)


def _rebinned(bins: Sequence[Metrics], width: float) -> dict[int, int]:
    """Counts by the index of the wider bin in which the middle of a bin lies."""
    counts: dict[int, int] = {}
    for line in bins:
        index = math.floor((line["from_nats"] + line["to_nats"]) / 2 / width)
        counts[index] = counts.get(index, 0) + int(line["count"])
    return counts


def _central_range(bins: Sequence[Metrics]) -> tuple[float, float]:
    """The range of log w without the tails at either end that hold TAIL_FRACTION of the draws."""
    tail = TAIL_FRACTION * sum(line["count"] for line in bins)
    ascending = sorted(bins, key=lambda line: line["from_nats"])
    ends: list[float] = []
    for lines, edge in ((ascending, "from_nats"), (ascending[::-1], "to_nats")):
        passed = 0.0
        for line in lines:
            passed += line["count"]
            if passed > tail:
                ends.append(line[edge])
                break
    return ends[0], ends[1]
