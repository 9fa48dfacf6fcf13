"""How every picture looks, and how one is written: a PNG, and a CSV of what it shows."""

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

from boltlm.figures.arms import Arm, chain, controls

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
DOTS_PER_INCH = 150
BLUE = "#0072b2"
# Okabe and Ito's colours, told apart by colour-blind eyes; blue is the chain's.
_CONTROLS = ("#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9")
_DASHES = ((0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_LINE_INCHES = 0.165  # of a label, at the font size above


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture and the rows behind it."""

    figure: Figure
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Why there is no picture."""

    reason: str


@dataclass(frozen=True, slots=True)
class Look:
    """How a model is drawn, the same in every picture."""

    color: str
    dash: Any


def looks(arms: Sequence[Arm]) -> dict[str, Look]:
    """The chain in blues, solid, later ones darker; controls each in another colour and dash."""
    line = chain(arms)
    blues = colormaps["Blues"](np.linspace(0.4, 1.0, len(line)))
    found = {arm.name: Look(to_hex(blue), "solid") for arm, blue in zip(line, blues, strict=True)}
    for place, arm in enumerate(controls(arms)):
        rounds, color = divmod(place, len(_CONTROLS))
        found[arm.name] = Look(_CONTROLS[color], _DASHES[(color + rounds) % len(_DASHES)])
    return found


def panels(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of so many inches and its axes, `[row, column]`."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False)


def label_right(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write (height in data units, text, colour) beside the right edge, moved apart where they
    would touch; a thin line leads from each text to its height. The limits must be final."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    height = axes.get_position().height * figure.get_figheight()
    low, high = axes.get_ylim()
    ordered = sorted(labels, key=lambda label: label[0], reverse=True)[::-1]  # ties in order
    wanted = [(value - low) / (high - low) for value, _, _ in ordered]
    gaps = [_LINE_INCHES / height * (1 + text.count("\n")) for _, text, _ in ordered]
    for (_, text, color), at, place in zip(ordered, wanted, _apart(wanted, gaps), strict=True):
        axes.plot(
            (1.0, 1.04),
            (at, place),
            color=color,
            linewidth=0.7,
            clip_on=False,
            transform=axes.transAxes,
            scalex=False,
            scaley=False,
        )
        axes.text(1.05, place, text, color=color, va="center", transform=axes.transAxes)


def _apart(wanted: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """Rising places near the rising `wanted`, each at least the mean of two gaps after the last:
    runs that would overlap are spread about their own middle."""
    runs: list[tuple[list[float], list[float]]] = []
    for place, gap in zip(wanted, gaps, strict=True):
        run = ([place], [gap])
        while runs and _span(*runs[-1])[1] > _span(*run)[0]:
            before = runs.pop()
            run = (before[0] + run[0], before[1] + run[1])
        runs.append(run)
    places: list[float] = []
    for centres, sizes in runs:
        edge = _span(centres, sizes)[0]
        for size in sizes:
            places.append(edge + size / 2)
            edge += size
    return places


def _span(centres: Sequence[float], sizes: Sequence[float]) -> tuple[float, float]:
    middle, half = sum(centres) / len(centres), sum(sizes) / 2
    return middle - half, middle + half


def save(out: Path, stem: str, drawn: Drawn | LeftOut) -> None:
    """Write `<stem>.png` and `<stem>.csv`, the same bytes for the same numbers; for a picture
    that is left out, remove the ones of an earlier run."""
    picture, table = out / f"{stem}.png", out / f"{stem}.csv"
    if isinstance(drawn, LeftOut):
        picture.unlink(missing_ok=True)
        table.unlink(missing_ok=True)
        return
    with rc_context(dict(STYLE)):
        drawn.figure.savefig(
            picture, dpi=DOTS_PER_INCH, bbox_inches="tight", metadata={"Software": None}
        )
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(drawn.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(drawn.rows)
