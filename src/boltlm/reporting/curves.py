"""Curves over training (losses, validation, evaluated snapshots), and the distribution of the
importance weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from boltlm.evaluation.curve_points import CurvePoint, metric_direction
from boltlm.reporting.arms import em_chain, ordered_arms
from boltlm.reporting.plotting import (
    LineStyle,
    Plot,
    PlotRows,
    SkippedPlot,
    line_styles,
    subplots,
)
from boltlm.reporting.results import Metrics, Results

TAIL_FRACTION = 0.001  # of the weights, cut off by the axis at each end
PARENT_COLOR = "#555555"
VALIDATION_COLUMNS: Mapping[str, tuple[str, Callable[..., Any]]] = {
    "val_elbo": ("held-out ELBO, nats per token", np.maximum.accumulate),
    "val_nll": ("held-out NLL of raw text, nats per token", np.minimum.accumulate),
}  # columns of a training curve: the label of the axis, and the best value so far
SNAPSHOT_AXES = {"tokens": "training tokens", "raw_tokens": "raw tokens seen"}

_Curves = Mapping[str, Sequence[Metrics]]


def plot_training(results: Results) -> Plot | SkippedPlot:
    """Training loss by tokens of every model that has a curve. Parent models that are not entries
    of `models` have a panel of their own, because they are trained on other text."""
    curves = {name: lines for name, lines in results.curves.items() if lines}
    if not curves:
        return SkippedPlot("no model has a training curve")
    labels = _labels(results)
    parents = {name: lines for name, lines in curves.items() if name not in labels}
    models = {name: curves[name] for name in labels if name in curves}
    panels = [panel for panel in (parents, models) if panel]
    figure, ((*columns,),) = subplots(4.2 * len(panels), 3.4, 1, len(panels))
    styles = line_styles(results.arms)
    styles |= {name: LineStyle(PARENT_COLOR, "solid") for name in parents}
    for axes, panel in zip(columns, panels, strict=True):
        _loss_curves(axes, panel, styles, labels)
        if panel is parents:
            axes.legend(loc="upper right")
        else:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    columns[0].set_ylabel("training loss, nats per token")
    figure.subplots_adjust(wspace=0.22)
    rows = [
        {"model": name, "step": line["step"], "tokens": line["tokens"], "loss": line["loss"]}
        for name, lines in curves.items()
        for line in lines
    ]
    return Plot(figure, rows)


def plot_validation(results: Results) -> Plot | SkippedPlot:
    """Held-out metrics by tokens of every model that was validated during training: the values as
    points, and the best value so far as a line, as in the paper's curves."""
    labels = _labels(results)
    curves = {
        name: [
            line for line in results.curves.get(name, []) if VALIDATION_COLUMNS.keys() & line.keys()
        ]
        for name in labels
    }
    curves = {name: lines for name, lines in curves.items() if lines}
    if not curves:
        return SkippedPlot("no model was validated during training (train.validation)")
    metrics = [
        metric
        for metric in VALIDATION_COLUMNS
        if any(metric in line for lines in curves.values() for line in lines)
    ]
    figure, ((*columns,),) = subplots(4.6 * len(metrics), 3.4, 1, len(metrics))
    styles = line_styles(results.arms)
    rows: PlotRows = []
    for axes, metric in zip(columns, metrics, strict=True):
        rows += _validation_curves(axes, metric, curves, styles, labels)
    columns[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.subplots_adjust(wspace=0.3)
    return Plot(figure, rows)


def plot_snapshots(results: Results) -> Plot | SkippedPlot:
    """The metrics of evaluated snapshots, by training tokens and by tokens of raw text: the values
    as points with their standard errors, and the best value so far as a line. Likelihoods are
    drawn, of bounds the one with the largest K, and the accuracies of whole tasks."""
    labels = _labels(results)
    curves = {name: results.snapshot_curves.get(name, []) for name in labels}
    names = dict.fromkeys(point.metric for points in curves.values() for point in points)
    metrics = [name for name in names if _is_drawn(name)]
    if not metrics:
        return SkippedPlot("no snapshots were evaluated")
    figure, axes_RC = subplots(4.6 * len(metrics), 6.6, len(SNAPSHOT_AXES), len(metrics))
    styles = line_styles(results.arms)
    rows: PlotRows = []
    for column, metric in enumerate(metrics):
        for name, points in curves.items():
            measured = [p for p in points if p.metric == metric and p.value is not None]
            if measured:
                values = np.array([point.value for point in measured], dtype=float)
                sign = metric_direction(metric)
                best = sign * np.maximum.accumulate(sign * values)
                for row, field in enumerate(SNAPSHOT_AXES):
                    axes = axes_RC[row, column]
                    style, label = styles[name], labels[name]
                    _snapshot_curve(axes, measured, values, best, field, style, label)
                rows += [
                    {"model": name, **asdict(point), "best": float(top)}
                    for point, top in zip(measured, best, strict=True)
                ]
        for row, label in enumerate(SNAPSHOT_AXES.values()):
            axes_RC[row, column].set_ylabel(metric, fontsize=7)
            _token_axis(axes_RC[row, column], label)
    # A model can be missing from the last panel, beside which the legend is.
    pairs = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in axes_RC[0]]
    handles = {label: handle for panel in pairs for handle, label in panel}
    axes_RC[0, -1].legend(
        list(handles.values()), list(handles), loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )
    figure.subplots_adjust(wspace=0.35, hspace=0.3)
    return Plot(figure, rows)


def _is_drawn(metric: str) -> bool:
    """Whether a metric of snapshots has a panel."""
    left_out = ("elbo_per_token_k", "/cue", "accuracy_by_", "_per_document", "subset/", "_match")
    return metric_direction(metric) != 0 and not any(part in metric for part in left_out)


def _snapshot_curve(
    axes: Axes,
    points: Sequence[CurvePoint],
    values: np.ndarray,
    best: np.ndarray,
    field: str,
    style: LineStyle,
    label: str,
) -> None:
    """Draw one metric of one model; `field`: that of the x axis."""
    x = [getattr(point, field) for point in points]
    errors = [point.se or 0.0 for point in points]
    axes.errorbar(x, values, errors, fmt=".", color=style.color, markersize=4, linewidth=0.8)
    axes.plot(x, best, color=style.color, linestyle=style.dashes, label=label)


def plot_log_weight(results: Results) -> Plot | SkippedPlot:
    """The distribution of log w (docs/method.md, eq. (3)) in the latents that each iteration is
    trained on; the axis cuts off 0.1 % of the draws at either end."""
    entries = {
        arm.latents: (f"iteration {arm.iteration}, sampled by {arm.generator}", arm.name)
        for arm in em_chain(results.arms)
        if arm.latents is not None and results.histograms.get(arm.latents)
    }
    if not entries:
        return SkippedPlot("no latents of an EM chain have a histogram of log w")
    styles = line_styles(results.arms)
    figure, ((axes,),) = subplots(6.0, 3.4)
    for entry, (label, model) in entries.items():
        bins = results.histograms[entry]
        edges = [line["from_nats"] for line in bins] + [bins[-1]["to_nats"]]
        counts = np.array([line["count"] for line in bins])
        axes.stairs(
            counts / counts.sum(),
            edges,
            color=styles[model].color,
            linewidth=1.5,
            label=label,
        )
    all_bins = [line for entry in entries for line in results.histograms[entry]]
    axes.set_xlim(*_central_range(all_bins))
    axes.set_xlabel("log w = log p(Z) + log p(X | Z) − log q(Z | X), nats per chunk")
    axes.set_ylabel("fraction of draws per bin")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    rows = [{"latents": entry, **line} for entry in entries for line in results.histograms[entry]]
    return Plot(figure, rows)


def _labels(results: Results) -> dict[str, str]:
    """The entries of `models` in their order, each with its name and role."""
    arms = (arm for arm in ordered_arms(results.arms) if arm.role != "base")
    return {arm.name: f"{arm.name}: {arm.description}" for arm in arms}


def _loss_curves(
    axes: Axes, curves: _Curves, styles: Mapping[str, LineStyle], labels: Mapping[str, str]
) -> None:
    for name, lines in curves.items():
        axes.plot(
            [line["tokens"] for line in lines],
            [line["loss"] for line in lines],
            color=styles[name].color,
            linestyle=styles[name].dashes,
            linewidth=1.3,
            label=labels.get(name, name),
        )
    _token_axis(axes)


def _validation_curves(
    axes: Axes,
    metric: str,
    curves: _Curves,
    styles: Mapping[str, LineStyle],
    labels: Mapping[str, str],
) -> PlotRows:
    """Draw one held-out metric of every model; returns the rows of its CSV."""
    axis_label, best_so_far = VALIDATION_COLUMNS[metric]
    rows: PlotRows = []
    for name, lines in curves.items():
        tokens = [line["tokens"] for line in lines if metric in line]
        values = [line[metric] for line in lines if metric in line]
        best = best_so_far(values) if values else []
        style = styles[name]
        axes.plot(tokens, values, ".", color=style.color, markersize=4)
        axes.plot(tokens, best, color=style.color, linestyle=style.dashes, label=labels[name])
        rows += [
            {"model": name, "metric": metric, "tokens": count, "value": value, "best": float(top)}
            for count, value, top in zip(tokens, values, best, strict=True)
        ]
    axes.set_ylabel(axis_label)
    _token_axis(axes)
    return rows


def _token_axis(axes: Axes, label: str = SNAPSHOT_AXES["tokens"]) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


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
