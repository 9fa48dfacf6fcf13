"""The style of the figures, and the files of a figure: PNG, SVG, and a CSV of what it shows."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from matplotlib.typing import RcKeyType

from boltlm.reporting.arms import Arm, em_chain
from boltlm.reporting.metric_names import FRACTION
from boltlm.reporting.quantities import Quantity

STYLE: Mapping[RcKeyType, Any] = {
    "font.size": 10,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.5,
    "svg.hashsalt": "boltlm",  # the ids in an SVG are those of every other run
    "svg.fonttype": "none",
}
DPI = 140
BLUE = "#0072b2"
GREY = "#8c8c8c"
# The palette of Okabe and Ito, which colour-blind readers can distinguish; blue is the EM chain.
_CONTROL_COLORS = ("#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9")
_DASHES = ((0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_SCALES = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
WIDE_INCHES, LEGEND_INCHES = 7.5, 3.2  # wider figures have the legend below; width of a column
MIN_RELATIVE_SPAN = 0.02  # of an axis, to the size of its values: noise below it is not blown up

PlotRows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure and the numbers that it shows, one mapping for each row of its CSV."""

    figure: Figure
    rows: PlotRows


@dataclass(frozen=True, slots=True)
class SkippedPlot:
    """A figure that is not drawn, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class LineStyle:
    """How a model is drawn, the same in every figure."""

    color: str
    dashes: Any  # a linestyle of matplotlib: a name, or an offset and the lengths of the dashes


def line_styles(arms: Sequence[Arm]) -> dict[str, LineStyle]:
    """The styles by model. The chain is drawn in solid blues that become darker from iteration to
    iteration, each other model in a colour and dash pattern that differ from its neighbours'. Other
    trainings of a model look like it."""
    chain = em_chain(arms)
    blues = colormaps["Blues"](np.linspace(0.45, 1.0, len(chain)))
    styles = {
        arm.name: LineStyle(to_hex(blue), "solid") for arm, blue in zip(chain, blues, strict=True)
    }
    others = [arm for arm in arms if arm.name not in styles and arm.training_of is None]
    # Mixtures last: beside the methods that they are variants of they are drawn in few figures.
    for index, arm in enumerate(sorted(others, key=lambda arm: arm.mix_raw > 0)):
        cycle, color = divmod(index, len(_CONTROL_COLORS))
        dashes = _DASHES[(color + cycle) % len(_DASHES)]
        styles[arm.name] = LineStyle(_CONTROL_COLORS[color], dashes)
    return styles | {arm.name: styles[arm.training_of] for arm in arms if arm.training_of}


def panels(count: int, rows: int = 1, *, width: float = 2.9, height: float = 2.5) -> Any:
    """A figure and its axes `[row, column]` for `count` panels in each row; sizes in inches."""
    figure = Figure(figsize=(width * count + 0.4, height * rows), layout="constrained")
    return figure, figure.subplots(rows, count, squeeze=False)


def draw_points(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    errors: Sequence[float | None],
    style: LineStyle,
    *,
    label: str = "",
    doubtful: Sequence[bool] = (),
    joined: bool = True,
) -> None:
    """A line with markers and error bars; markers of doubtful values are hollow."""
    axes.errorbar(
        x,
        y,
        yerr=[error or 0.0 for error in errors],
        color=style.color,
        marker="o",
        linestyle=style.dashes if joined else "none",
        label=label,
    )
    hollow = [i for i, is_doubtful in enumerate(doubtful) if is_doubtful]
    if hollow:
        axes.plot(
            [x[i] for i in hollow],
            [y[i] for i in hollow],
            marker="o",
            linestyle="none",
            markerfacecolor="white",
            markeredgecolor=style.color,
            zorder=5,
        )


def draw_band(
    axes: Axes, x: Sequence[float], y: Sequence[float], errors: Sequence[float | None], color: str
) -> None:
    """A band of one error on either side."""
    half = np.array([error or 0.0 for error in errors])
    axes.fill_between(x, np.array(y) - half, np.array(y) + half, color=color, alpha=0.16, lw=0)


def value_axis(axes: Axes, quantity: Quantity, note: str = "") -> None:
    """Title and y axis of a panel. Percent and counts begin at 0; other ranges are so wide that
    differences below MIN_RELATIVE_SPAN look small."""
    axes.set_title(quantity.label)
    axes.set_ylabel(f"{quantity.axis_label}{note}")
    low, high = axes.get_ylim()
    if quantity.unit == FRACTION:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        high = min(1.04 * max(high, 0.05), 1.04)
        axes.set_ylim(-0.03 * high, high)
        return
    if quantity.unit in ("draws", "tokens", "latents"):
        axes.set_ylim(0, 1.05 * high)
        return
    missing = MIN_RELATIVE_SPAN * max(abs(low), abs(high)) - (high - low)
    if missing > 0:
        axes.set_ylim(low - missing / 2, high + missing / 2)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))


def token_axis(axes: Axes, label: str) -> None:
    """Label the x axis, with a scale so that its ticks are small numbers."""
    top = axes.get_xlim()[1]
    scale, name = next((s for s in _SCALES if top >= s[0]), (1.0, ""))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick / scale:g}"))
    axes.set_xlabel(f"{label}{f', {name}' if name else ''}")


def add_legend(figure: Figure, all_axes: Sequence[Axes], order: Sequence[str]) -> None:
    """One legend for all panels, in the given order of labels: right of one or two panels, else
    below them. A single entry needs none."""
    entries = {
        label: handle
        for axes in all_axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    labels = [label for label in dict.fromkeys(order) if label in entries]
    labels += [label for label in entries if label not in labels]
    handles = [entries[label] for label in labels]
    width = figure.get_figwidth()
    if len(labels) > 1 and width < WIDE_INCHES:
        figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    elif len(labels) > 1:
        columns = int(width // LEGEND_INCHES)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0)}
        figure.legend(handles, labels, ncols=columns, **place)


def save_plot(out: Path, stem: str, plot: Plot | SkippedPlot) -> None:
    """Write `<stem>.png`, `<stem>.svg` and `<stem>.csv`, the same bytes for the same numbers. For a
    skipped figure, remove the files of an earlier run."""
    paths = {suffix: out / f"{stem}.{suffix}" for suffix in ("png", "svg", "csv")}
    if isinstance(plot, SkippedPlot):
        for path in paths.values():
            path.unlink(missing_ok=True)
        return
    with rc_context(dict(STYLE)):
        figure = plot.figure
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout is made once, not for each file
        box = {"bbox_inches": figure.get_tightbbox().padded(0.08), "dpi": DPI}
        figure.savefig(paths["png"], metadata={"Software": None}, **box)
        figure.savefig(paths["svg"], metadata={"Date": None, "Creator": None}, **box)
    with paths["csv"].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(plot.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(plot.rows)
