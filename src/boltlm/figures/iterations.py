"""Measures against the iteration t of the EM chain, its controls as horizontal lines."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from boltlm.figures.arms import Arm, chain, controls
from boltlm.figures.drawing import BLUE, Drawn, LeftOut, label_right, looks, panels
from boltlm.figures.results import Number, Results

Rows = list[dict[str, Any]]
LATENT, NONE = "questions/standard/latent/accuracy", "questions/standard/raw/accuracy"
ORANGE = "#d55e00"


def elbo(results: Results) -> Drawn | LeftOut:
    """The bound per token of each M_t; controls; and for models without a bound, on the same
    scale, the raw likelihood −NLL."""
    if not _has(results, "elbo_per_token"):
        return LeftOut("no model of an EM chain has elbo_per_token")
    figure, ((axes,),) = panels(5.6, 3.8)
    rows = _line(axes, results, "elbo_per_token", color=BLUE, dash="solid")
    labels: list[tuple[float, str, str]] = []
    for arm in controls(results.arms):
        bound = results.number(arm.name, "elbo_per_token")
        raw = results.number(arm.name, "nll_per_token")
        if bound is not None:
            rows.append(_row(arm, "elbo_per_token", bound))
            labels.append(_level(axes, results, arm, bound))
        elif raw is not None:
            rows.append(_row(arm, "nll_per_token", raw))
            labels.append(_level(axes, results, arm, Number(value=-raw.value, se=raw.se), "−NLL"))
    sizes = results.bound_sizes()
    draws = f" (K = {sizes[-1]})" if sizes else ""
    axes.set_ylabel(f"held-out ELBO{draws}, nats per token")
    _iterations(axes, results)
    label_right(axes, labels)
    return Drawn(figure, rows)


def accuracy(results: Results) -> Drawn | LeftOut:
    """Share of held-out questions answered right: with a thought in the latent space (solid)
    and without one (dashed); of each control the first of the two that it has."""
    if not (_has(results, LATENT) or _has(results, NONE)):
        return LeftOut("no model of an EM chain was asked questions")
    figure, ((axes,),) = panels(5.6, 3.8)
    rows = _line(axes, results, LATENT, color=BLUE, dash="solid", label="thought, then answer")
    rows += _line(axes, results, NONE, color=BLUE, dash="dashed", label="answer at once")
    labels: list[tuple[float, str, str]] = []
    for arm in controls(results.arms):
        for metric, kind in ((LATENT, "with thought"), (NONE, "at once")):
            number = results.number(arm.name, metric)
            if number is not None:
                rows.append(_row(arm, metric, number))
                labels.append(_level(axes, results, arm, number, kind))
                break
    axes.set_ylabel("questions answered correctly")
    _percent(axes)
    _iterations(axes, results)
    label_right(axes, labels)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.2)
    return Drawn(figure, rows)


def parts(results: Results) -> Drawn | LeftOut:
    """The three terms whose sum is the bound for K = 1."""
    named = {
        "utility": "utility, E[log p(X | Z)]",
        "simplicity": "simplicity, E[log p(Z)]",
        "diversity": "diversity, E[−log q(Z)]",
    }
    if not any(_has(results, metric) for metric in named):
        return LeftOut("no model of an EM chain has the parts of the bound")
    figure, ((*columns,),) = panels(9.0, 2.7, 1, 3)
    rows: Rows = []
    for axes, (metric, title) in zip(columns, named.items(), strict=True):
        rows += _line(axes, results, metric, color=BLUE, dash="solid")
        axes.set_title(title, fontsize="medium", loc="left")
        _iterations(axes, results, names=False)
    columns[0].set_ylabel("nats per chunk")
    figure.subplots_adjust(wspace=0.3)
    return Drawn(figure, rows)


def diagnostics(results: Results) -> Drawn | LeftOut:
    """How good the draws of each M_t are, on the held-out chunks; panels without numbers are
    left away."""
    sizes = results.bound_sizes()
    named = {
        "draws that are the data's own latent": {
            "exact_fraction": "all",
            "exact_fraction_kept": "kept",
        },
        "length of a latent, tokens": {"latent_tokens_mean": ""},
        f"effective sample size{f' of K = {sizes[-1]}' if sizes else ''}": {"ess_mean": ""},
        "draws that did not finish": {"unfinished_fraction": ""},
    }
    shown = {
        title: metrics
        for title, metrics in named.items()
        if any(_has(results, metric) for metric in metrics)
    }
    if not shown:
        return LeftOut("no model of an EM chain has diagnostics of its draws")
    height = (len(shown) + 1) // 2
    figure, grid = panels(7.2, 2.6 * height, height, 2)
    rows: Rows = []
    for axes, (title, metrics) in zip(grid.flat, shown.items(), strict=False):
        for (metric, label), color in zip(metrics.items(), (BLUE, ORANGE), strict=False):
            rows += _line(axes, results, metric, color=color, dash="solid", label=label)
        if any("fraction" in metric for metric in metrics):
            _percent(axes)
        axes.set_title(title, fontsize="medium", loc="left")
        _iterations(axes, results, names=False)
        if len(metrics) > 1:
            axes.legend()
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    figure.subplots_adjust(wspace=0.25, hspace=0.5)
    return Drawn(figure, rows)


def _has(results: Results, metric: str) -> bool:
    return any(results.number(arm.name, metric) is not None for arm in chain(results.arms))


def _row(arm: Arm, metric: str, number: Number) -> dict[str, Any]:
    return {
        "model": arm.name,
        "role": arm.role,
        "iteration": arm.iteration,
        "metric": metric,
        "value": number.value,
        "se": number.se,
    }


def _line(
    axes: Axes, results: Results, metric: str, *, color: str, dash: str, label: str = ""
) -> Rows:
    """The chain's measure with its standard errors; iterations without it are gaps in x only."""
    found = [(arm, results.number(arm.name, metric)) for arm in chain(results.arms)]
    known = [(arm, number) for arm, number in found if number is not None]
    if known:
        errors = [number.se or 0.0 for _, number in known]
        axes.errorbar(
            [arm.iteration or 0 for arm, _ in known],
            [number.value for _, number in known],
            yerr=errors if any(errors) else None,
            color=color,
            marker="o",
            linestyle=dash,
            label=label,
        )
    return [_row(arm, metric, number) for arm, number in known]


def _level(
    axes: Axes, results: Results, arm: Arm, number: Number, kind: str = ""
) -> tuple[float, str, str]:
    """A control as a horizontal line, its standard error as a band; returns its label."""
    look = looks(results.arms)[arm.name]
    axes.axhline(number.value, color=look.color, linestyle=look.dash, linewidth=1.2)
    if number.se:
        axes.axhspan(
            number.value - number.se,
            number.value + number.se,
            color=look.color,
            alpha=0.12,
            linewidth=0,
        )
    kinds = f"{arm.what}, {kind}" if kind else arm.what
    return number.value, f"{arm.name}: {kinds}", look.color


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    top = axes.get_ylim()[1]
    axes.set_ylim(-0.03 * top, top)  # from 0, with room for a mark on it


def _iterations(axes: Axes, results: Results, *, names: bool = True) -> None:
    """Whole iterations on the x axis, under each the name of its model."""
    line: Sequence[Arm] = chain(results.arms)
    ticks = [f"{arm.iteration}\n{arm.name}" if names else f"{arm.iteration}" for arm in line]
    axes.set_xticks(range(len(line)), ticks)
    axes.set_xlim(-0.3, len(line) - 0.7)
    axes.set_xlabel("iteration")
    axes.grid(visible=False, axis="x")
