"""Figures of final models: by iteration of the EM chain, by a number that models differ in (K, the
share of raw text), model by model, and over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from boltlm.reporting.arms import Arm, em_chain
from boltlm.reporting.curves import legend_label
from boltlm.reporting.metric_names import FRACTION
from boltlm.reporting.plotting import (
    BLUE,
    GREY,
    MIN_RELATIVE_SPAN,
    LineStyle,
    Plot,
    PlotRows,
    SkippedPlot,
    add_legend,
    draw_points,
    line_styles,
    panels,
    value_axis,
)
from boltlm.reporting.quantities import Quantity, Value, shown_arms, value_of_arm
from boltlm.reporting.results import Results

LATENT_ACCURACY = "questions/standard/latent/accuracy"
COT_ACCURACY = "questions/standard/cot/accuracy"
RAW_ACCURACY = "questions/standard/raw/accuracy"
CHAIN_LABEL = "EM chain, by iteration"
PAPER_LABEL = "the paper's value"
_MARKERS = "oDs^"
_SERIES_COLORS = (BLUE, "#d55e00", "#009e73", "#cc79a7")
FAMILY_STYLES = tuple(LineStyle(color, "solid") for color in _SERIES_COLORS)
REACH = 2  # how far, in ranges of the chain, another model may stretch an axis

References = Mapping[tuple[str, str], float]  # the paper's values by model and by label of quantity


def draw_by_iteration(
    results: Results,
    quantities: Sequence[Quantity],
    *,
    columns: int = 3,
    references: References | None = None,
    levels: Mapping[str, float] | None = None,
    controls: bool = True,
) -> Plot | SkippedPlot:
    """Each quantity by iteration t with error bars; the other models are horizontal lines with a
    band, or named below where they lie far outside. Quantities that no model of the chain has
    are left out. `levels`: dotted lines with their labels."""
    chain = em_chain(results.arms)
    if not chain:
        return SkippedPlot("the models form no EM chain")
    shown = [q for q in quantities if any(value_of_arm(results, arm, q) for arm in chain)]
    if not shown:
        return SkippedPlot("no model of the EM chain has its metrics")
    columns = min(columns, len(shown))
    figure, grid = panels(columns, -(-len(shown) // columns), height=2.6)
    others = [arm for arm in shown_arms(results) if arm.iteration is None and controls]
    styles, rows = line_styles(results.arms), list[dict[str, Any]]()
    for axes, quantity in zip(grid.flat, shown, strict=False):
        rows += _chain(axes, results, chain, quantity, LineStyle(BLUE, "solid"))
        values = {a: v for a in others if (v := value_of_arm(results, a, quantity))}
        rows += [_row(arm, value) for arm, value in values.items()]
        near, note = _within_reach(axes, values, quantity)
        for arm, value in near.items():
            draw_level(axes, value, styles[arm.name], legend_label(arm))
        for label, level in (levels or {}).items():
            axes.axhline(level, color="black", linestyle="dotted", linewidth=1.2, label=label)
        _references(axes, chain, quantity, references or {})
        value_axis(axes, quantity)
        iteration_axis(axes, len(chain), note)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    order = [CHAIN_LABEL, *map(legend_label, others)]
    add_legend(figure, list(grid.flat[: len(shown)]), order)
    return Plot(figure, rows)


def draw_by_number(
    quantities: Sequence[Quantity],
    families: Mapping[str, Sequence[tuple[float, str, Value]]],
    label: str,
    styles: Sequence[LineStyle] = FAMILY_STYLES,
) -> Plot:
    """Each quantity against a number; `families`: for each line, its points (the number, the label
    of the quantity, the value), drawn in its style."""
    shown = [q for q in quantities if any(p[1] == q.label for f in families.values() for p in f)]
    figure, ((*columns,),) = panels(len(shown), height=2.8)
    rows: PlotRows = []
    for axes, quantity in zip(columns, shown, strict=True):
        for (family, points), style in zip(families.items(), styles, strict=False):
            own = sorted((x, v) for x, name, v in points if name == quantity.label)
            xs, values = [x for x, _ in own], [v for _, v in own]
            draw_points(
                axes,
                xs,
                [value.value for value in values],
                [value.error for value in values],
                style,
                label=family,
                doubtful=[value.is_doubtful for value in values],
            )
            rows += [{"family": family, "x": x, **value_row(v)} for x, v in own]
        value_axis(axes, quantity)
        axes.set_xlabel(label)
    add_legend(figure, columns, list(families))
    return Plot(figure, rows)


def use_log2_axis(axes: Axes, ticks: Sequence[float]) -> None:
    """For numbers that double."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))


def draw_models(
    panels_of: Mapping[str, Mapping[str, Quantity]],
    *,
    arms: Sequence[Arm],
    values: Mapping[tuple[str, str, str], Value],
    references: References | None = None,
) -> Plot | SkippedPlot:
    """A row for each model, a panel for each task, and in it a marker for each series. `panels_of`:
    by panel, the quantity of each series; `values`: by (panel, series, model)."""
    models = [arm for arm in arms if any(key[2] == arm.name for key in values)]
    if not models:
        return SkippedPlot("no model has its metrics")
    height = 0.9 + 0.32 * len(models)
    figure, ((*columns,),) = panels(len(panels_of), height=height)
    places = {arm.name: len(models) - 1 - index for index, arm in enumerate(models)}
    rows: PlotRows = []
    for axes, (panel, quantities) in zip(columns, panels_of.items(), strict=True):
        for index, series in enumerate(quantities):
            offset = 0.16 * (len(quantities) - 1) / 2 - 0.16 * index
            own = [(a, v) for a in models if (v := values.get((panel, series, a.name)))]
            style = LineStyle(_SERIES_COLORS[index], "none")
            axes.errorbar(
                [v.value for _, v in own],
                [places[a.name] + offset for a, _ in own],
                xerr=[v.error or 0.0 for _, v in own],
                color=style.color,
                marker=_MARKERS[index],
                linestyle="none",
                label=series,
            )
            rows += [{"panel": panel, "series": series, **_row(a, v)} for a, v in own]
        known = {a.name: (references or {}).get((a.name, panel)) for a in models}
        marks = [(value, places[name]) for name, value in known.items() if value is not None]
        if marks:
            xs, ys = zip(*marks, strict=True)
            axes.plot(xs, ys, "|", color=GREY, markersize=12, label=PAPER_LABEL, zorder=1)
        _model_axis(axes, models, panel, next(iter(quantities.values())), axes is columns[0])
    add_legend(figure, columns, [*next(iter(panels_of.values())), PAPER_LABEL])
    return Plot(figure, rows)


def _model_axis(
    axes: Axes, models: Sequence[Arm], panel: str, quantity: Quantity, is_first: bool
) -> None:
    axes.set_title(panel)
    axes.set_yticks(range(len(models)), [a.name for a in models[::-1]] if is_first else [])
    axes.set_ylim(-0.6, len(models) - 0.4)
    if quantity.unit == FRACTION:
        axes.set_xlim(left=-0.02 * max(axes.get_xlim()[1], 0.05))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    axes.set_xlabel(f"accuracy, {'%' if quantity.unit == FRACTION else quantity.unit}")


def _chain(
    axes: Axes, results: Results, chain: Sequence[Arm], quantity: Quantity, style: LineStyle
) -> PlotRows:
    """Draw the chain; iterations without the quantity are left out, and the line connects their
    neighbours."""
    points = [(arm, v) for arm in chain if (v := value_of_arm(results, arm, quantity))]
    draw_points(
        axes,
        [arm.iteration or 0 for arm, _ in points],
        [value.value for _, value in points],
        [value.error for _, value in points],
        style,
        label=CHAIN_LABEL,
        doubtful=[value.is_doubtful for _, value in points],
    )
    return [_row(arm, value) for arm, value in points]


def draw_level(axes: Axes, measured: Value, style: LineStyle, label: str) -> None:
    """A horizontal line with a band of one error."""
    line = {"color": style.color, "linestyle": style.dashes, "linewidth": 1.2}
    axes.axhline(measured.value, **line, label=label)
    if measured.error:
        low, high = measured.value - measured.error, measured.value + measured.error
        axes.axhspan(low, high, color=style.color, alpha=0.12, linewidth=0)


def iteration_axis(axes: Axes, count: int, note: str = "") -> None:
    """Ticks at the iterations 0, 1, …; `note`: below the label."""
    axes.set_xticks(range(count))
    axes.set_xlim(-0.3, count - 0.7)
    axes.set_xlabel(f"iteration\n{note}".strip())
    axes.grid(visible=False, axis="x")


def _within_reach(
    axes: Axes, values: Mapping[Arm, Value], quantity: Quantity
) -> tuple[Mapping[Arm, Value], str]:
    """The values that do not stretch the axis beyond REACH times the range of the chain, and a text
    that has the others."""
    low, high = axes.get_ylim()
    reach = REACH * max(high - low, MIN_RELATIVE_SPAN * max(abs(low), abs(high)))
    if quantity.unit == FRACTION:
        return values, ""
    near = {a: v for a, v in values.items() if low - reach <= v.value <= high + reach}
    far = [f"{a.name} {v.value:.3f}".replace("-", "−") for a, v in values.items() if a not in near]
    return near, f"(not shown: {', '.join(far)})" if far else ""


def _references(
    axes: Axes, chain: Sequence[Arm], quantity: Quantity, references: References
) -> None:
    points = [
        (arm.iteration or 0, value)
        for arm in chain
        if (value := references.get((arm.name, quantity.metrics[0][0]))) is not None
    ]
    if points:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, "_", color=GREY, markersize=12, label=PAPER_LABEL, zorder=1)


def _row(arm: Arm, value: Value) -> dict[str, Any]:
    return {
        "model": arm.name,
        "role": arm.role,
        "iteration": arm.iteration,
        **value_row(value),
    }


def value_row(value: Value) -> dict[str, Any]:
    return {
        "metric": value.metric,
        "value": value.value,
        "se": value.error,
        "n": value.trainings,
        "doubtful": value.is_doubtful,
    }
