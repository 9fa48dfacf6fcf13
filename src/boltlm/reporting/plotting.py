"""The style of the figures, and the files of a figure: a PNG, and a CSV of what it shows."""

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
from matplotlib.typing import RcKeyType

from boltlm.reporting.arms import Arm, control_arms, em_chain

STYLE: Mapping[RcKeyType, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.5,
}
DPI = 150
BLUE = "#0072b2"
# The palette of Okabe and Ito, which colour-blind readers can distinguish; blue is the EM chain.
_CONTROL_COLORS = ("#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9")
_DASHES = ((0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_LABEL_LINE_INCHES = 0.165  # height of one line of a label at the font size above

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
    """How the lines of a model are drawn, the same in every figure."""

    color: str
    dashes: Any  # a linestyle of matplotlib: a name, or an offset and the lengths of the dashes


@dataclass(frozen=True, slots=True)
class LineLabel:
    """A text beside the right edge of the axes, at the height `y` in data units."""

    y: float
    text: str
    color: str


def line_styles(arms: Sequence[Arm]) -> dict[str, LineStyle]:
    """The styles by model. The chain is drawn in solid blues that become darker from iteration to
    iteration, each other model in a colour and dash pattern that differ from its neighbours'."""
    chain = em_chain(arms)
    blues = colormaps["Blues"](np.linspace(0.4, 1.0, len(chain)))
    styles = {
        arm.name: LineStyle(to_hex(blue), "solid") for arm, blue in zip(chain, blues, strict=True)
    }
    for index, arm in enumerate(control_arms(arms)):
        cycle, color = divmod(index, len(_CONTROL_COLORS))
        dashes = _DASHES[(color + cycle) % len(_DASHES)]
        styles[arm.name] = LineStyle(_CONTROL_COLORS[color], dashes)
    return styles


def subplots(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure, its size in inches, and its axes as an array `[row, column]`."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False)


def label_right(axes: Axes, labels: Sequence[LineLabel]) -> None:
    """Write labels beside the right edge, moved apart where they would overlap; a thin line
    connects each text with its height. The limits of the y axis must be final."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    height = axes.get_position().height * figure.get_figheight()
    low, high = axes.get_ylim()
    # A stable descending sort, then reversed: of equal heights, the first label is on top.
    ascending = sorted(labels, key=lambda label: label.y, reverse=True)[::-1]
    targets = [(label.y - low) / (high - low) for label in ascending]
    heights = [_LABEL_LINE_INCHES / height * (1 + label.text.count("\n")) for label in ascending]
    positions = _without_overlap(targets, heights)
    for label, target, position in zip(ascending, targets, positions, strict=True):
        axes.plot(
            (1.0, 1.04),
            (target, position),
            color=label.color,
            linewidth=0.7,
            clip_on=False,
            transform=axes.transAxes,
            scalex=False,
            scaley=False,
        )
        axes.text(
            1.05, position, label.text, color=label.color, va="center", transform=axes.transAxes
        )


def _without_overlap(targets: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Centres for boxes of these heights, close to the ascending `targets`: neighbouring boxes that
    would overlap become a group, stacked around the mean of the group's targets."""
    groups: list[tuple[list[float], list[float]]] = []
    for target, height in zip(targets, heights, strict=True):
        group = ([target], [height])
        while groups and _extent(*groups[-1])[1] > _extent(*group)[0]:
            lower = groups.pop()
            group = (lower[0] + group[0], lower[1] + group[1])
        groups.append(group)
    centres: list[float] = []
    for group_targets, group_heights in groups:
        edge = _extent(group_targets, group_heights)[0]
        for height in group_heights:
            centres.append(edge + height / 2)
            edge += height
    return centres


def _extent(targets: Sequence[float], heights: Sequence[float]) -> tuple[float, float]:
    """Lower and upper edge of a group of stacked boxes."""
    middle, half = sum(targets) / len(targets), sum(heights) / 2
    return middle - half, middle + half


def save_plot(out: Path, stem: str, plot: Plot | SkippedPlot) -> None:
    """Write `<stem>.png` and `<stem>.csv`, the same bytes for the same numbers. For a skipped
    figure, remove the files of an earlier run."""
    image, table = out / f"{stem}.png", out / f"{stem}.csv"
    if isinstance(plot, SkippedPlot):
        image.unlink(missing_ok=True)
        table.unlink(missing_ok=True)
        return
    with rc_context(dict(STYLE)):
        plot.figure.savefig(image, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(plot.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(plot.rows)
