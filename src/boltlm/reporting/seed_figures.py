"""The figure of several seeds: the EM chain by iteration, with every seed and the mean."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from boltlm.reporting.arms import Arm, em_chain
from boltlm.reporting.curves import legend_label
from boltlm.reporting.iterations import draw_level, iteration_axis, value_row
from boltlm.reporting.plotting import (
    BLUE,
    GREY,
    LineStyle,
    Plot,
    SkippedPlot,
    add_legend,
    draw_points,
    line_styles,
    panels,
    value_axis,
)
from boltlm.reporting.quantities import Quantity, Value, shown_arms
from boltlm.reporting.results import Results

_Lines = Mapping[tuple[str, str], Mapping[str, str]]  # of metrics/seeds, by model and metric


def draw_seeds(results: Results, quantities: Sequence[Quantity]) -> Plot | SkippedPlot:
    """Means over seeds by iteration with 95 % intervals, the lines of the single seeds behind them;
    other models are horizontal lines with their intervals."""
    chain, arms = em_chain(results.arms), shown_arms(results)
    names = [arm.name for arm in chain]
    source, over = _largest_source(results, names)
    lines: _Lines = {
        (line["model"], line["metric"]): line
        for line in results.means
        if (line["source"], line["over"], line["group"]) == (source, over, "") and line["se"]
    }
    shown = [q for q in quantities if any((a, m) in lines for a in names for m, _ in q.metrics)]
    if not source or not shown:
        return SkippedPlot("fewer than two models of an EM chain were repeated with other seeds")
    figure, ((*columns,),) = panels(len(shown), width=3.0, height=3.0)
    styles, rows, others = line_styles(results.arms), list[dict[str, Any]](), list[str]()
    size = max(int(line["n"]) for line in lines.values())
    labels = f"EM chain: mean of {size} {over}", f"EM chain: each of the {over}"
    for axes, quantity in zip(columns, shown, strict=True):
        means = {arm: mean for arm in arms if (mean := _mean(lines, arm, quantity))}
        _draw_chain(axes, {a.iteration or 0: means[a] for a in chain if a in means}, labels)
        for arm, (value, _) in means.items():
            if arm.iteration is None:
                others.append(legend_label(arm))
                draw_level(axes, value, styles[arm.name], others[-1])
        for arm, (value, singles) in means.items():
            row = {"model": arm.name, "iteration": arm.iteration, "over": over, **value_row(value)}
            row["half_width"] = row.pop("se")
            rows.append(row | {"values": " ".join(map(repr, singles))})
        value_axis(axes, quantity)
        iteration_axis(axes, len(chain))
    add_legend(figure, columns, [*labels, *others])
    return Plot(figure, rows)


def _largest_source(results: Results, chain: Sequence[str]) -> tuple[str, str]:
    """The source of means, and what they are over, with most models of the chain; empty if none has
    two of them."""
    models: dict[tuple[str, str], set[str]] = {}
    for line in results.means:
        if line["model"] in chain and not line["group"] and line["se"]:
            models.setdefault((line["source"], line["over"]), set()).add(line["model"])
    best = max(models, key=lambda key: len(models[key]), default=("", ""))
    return best if len(models.get(best, ())) > 1 else ("", "")


def _mean(lines: _Lines, arm: Arm, quantity: Quantity) -> tuple[Value, list[float]] | None:
    """A mean over seeds with the half-width of its interval, and the single values."""
    for metric, sign in quantity.metrics:
        if line := lines.get((arm.name, metric)):
            half = (float(line["high"]) - float(line["low"])) / 2
            value = Value(sign * float(line["mean"]), half, int(line["n"]), metric, False)
            return value, [sign * float(number) for number in line["values"].split()]
    return None


def _draw_chain(
    axes: Axes, means: Mapping[int, tuple[Value, list[float]]], labels: tuple[str, str]
) -> None:
    """Draw the mean and, where each seed has every iteration, its line; `labels` of both."""
    if len({len(singles) for _, singles in means.values()}) == 1:
        for index, values in enumerate(np.array([singles for _, singles in means.values()]).T):
            label = labels[1] if index == 0 else ""
            axes.plot(list(means), values, color=GREY, linewidth=0.6, alpha=0.7, label=label)
    values = [value for value, _ in means.values()]
    errors = [value.error for value in values]
    style = LineStyle(BLUE, "solid")
    middle = [value.value for value in values]
    draw_points(axes, list(means), middle, errors, style, label=labels[0])
