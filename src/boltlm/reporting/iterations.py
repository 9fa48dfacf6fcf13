"""Metrics by iteration t of the EM chain; the controls are horizontal lines."""

from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from boltlm.reporting.arms import Arm, control_arms, em_chain
from boltlm.reporting.plotting import (
    BLUE,
    LineLabel,
    Plot,
    PlotRows,
    SkippedPlot,
    label_right,
    line_styles,
    subplots,
)
from boltlm.reporting.results import Estimate, Results

LATENT_ACCURACY = "questions/standard/latent/accuracy"
COT_ACCURACY = "questions/standard/cot/accuracy"
RAW_ACCURACY = "questions/standard/raw/accuracy"
ORANGE = "#d55e00"


@dataclass(frozen=True, slots=True)
class _Panel:
    """One panel of a figure: its metrics with their labels in the legend."""

    title: str
    metrics: dict[str, str]
    percent: bool


def plot_elbo(results: Results) -> Plot | SkippedPlot:
    """The bound per token (docs/method.md, eq. (7)) of each M_t and of each control; for controls
    without a bound, on the same scale, the log-likelihood of the same chunks in the same contexts.
    A dotted line shows the ceiling, where it is known.
    """
    if not _has(results, "elbo_per_token"):
        return SkippedPlot("no model of an EM chain has elbo_per_token")
    figure, ((axes,),) = subplots(5.6, 3.8)
    rows = _chain_line(axes, results, "elbo_per_token", color=BLUE, dashes="solid")
    labels: list[LineLabel] = []
    for arm in control_arms(results.arms):
        bound = results.estimate(arm.name, "elbo_per_token")
        nll = results.estimate(arm.name, "nll_in_context_per_token")
        if bound is not None:
            rows.append(_row(arm, "elbo_per_token", bound))
            labels.append(_control_line(axes, results, arm, bound))
        elif nll is not None:
            rows.append(_row(arm, "nll_in_context_per_token", nll))
            likelihood = Estimate(value=-nll.value, se=nll.se)
            labels.append(_control_line(axes, results, arm, likelihood, "−NLL"))
    for ceiling in {metrics.get("ceiling_per_token") for metrics in results.evaluation.values()}:
        if ceiling is not None:
            axes.axhline(ceiling, color="black", linestyle="dotted", linewidth=1.2)
            labels.append(LineLabel(ceiling, "ceiling: log p of the generator", "black"))
    sizes = results.bound_sizes()
    draws = f" (K = {sizes[-1]})" if sizes else ""
    axes.set_ylabel(f"held-out ELBO{draws}, nats per token")
    _iteration_axis(axes, results)
    label_right(axes, labels)
    return Plot(figure, rows)


def plot_accuracy(results: Results) -> Plot | SkippedPlot:
    """Accuracy on the held-out questions with a latent thought before the answer (solid) and
    without one (dashed); of each control the first of these that it has: with a latent thought,
    with a thought in plain text, without one."""
    if not (_has(results, LATENT_ACCURACY) or _has(results, RAW_ACCURACY)):
        return SkippedPlot("no model of an EM chain was evaluated on the held-out questions")
    figure, ((axes,),) = subplots(5.6, 3.8)
    spaces = (
        (LATENT_ACCURACY, "solid", "with a latent thought"),
        (RAW_ACCURACY, "dashed", "direct answer"),
    )
    rows: PlotRows = []
    for metric, dashes, label in spaces:
        rows += _chain_line(axes, results, metric, color=BLUE, dashes=dashes, label=label)
    notes = {LATENT_ACCURACY: "with thought", COT_ACCURACY: "plain text", RAW_ACCURACY: "direct"}
    labels: list[LineLabel] = []
    for arm in control_arms(results.arms):
        for metric, note in notes.items():
            estimate = results.estimate(arm.name, metric)
            if estimate is not None:
                rows.append(_row(arm, metric, estimate))
                labels.append(_control_line(axes, results, arm, estimate, note))
                break
    axes.set_ylabel("accuracy on held-out questions")
    _percent_axis(axes)
    _iteration_axis(axes, results)
    label_right(axes, labels)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.2)
    return Plot(figure, rows)


def plot_elbo_terms(results: Results) -> Plot | SkippedPlot:
    """The three terms whose sum is the bound for K = 1 (docs/method.md, eq. (8))."""
    titles = {
        "utility": "utility, E[log p(X | Z)]",
        "simplicity": "simplicity, E[log p(Z)]",
        "diversity": "diversity, E[−log q(Z)]",
    }
    if not any(_has(results, metric) for metric in titles):
        return SkippedPlot("no model of an EM chain has utility, simplicity or diversity")
    figure, ((*columns,),) = subplots(9.0, 2.7, 1, 3)
    rows: PlotRows = []
    for axes, (metric, title) in zip(columns, titles.items(), strict=True):
        rows += _chain_line(axes, results, metric, color=BLUE, dashes="solid")
        axes.set_title(title, fontsize="medium", loc="left")
        _iteration_axis(axes, results, names=False)
    columns[0].set_ylabel("nats per chunk")
    figure.subplots_adjust(wspace=0.3)
    return Plot(figure, rows)


def plot_diagnostics(results: Results) -> Plot | SkippedPlot:
    """The quality of the latents that each M_t samples for the held-out chunks. Panels without
    numbers are omitted."""
    sizes = results.bound_sizes()
    draws = f" (K = {sizes[-1]})" if sizes else ""
    numbers = {"numbers_match": "all draws", "numbers_match_selected": "selected draws"}
    panels = [
        _Panel("latents with the reference's numbers", numbers, percent=True),
        _Panel("tokens per latent", {"latent_tokens_mean": ""}, percent=False),
        _Panel(f"effective sample size{draws}", {"ess_mean": ""}, percent=False),
        _Panel("distinct latents of a chunk", {"distinct_latents_mean": ""}, percent=False),
        _Panel("masked probability", {"masked_mass": ""}, percent=True),
    ]
    panels = [panel for panel in panels if any(_has(results, name) for name in panel.metrics)]
    if not panels:
        return SkippedPlot("no model of an EM chain has diagnostics of its samples")
    return _panel_plot(results, panels)


def _panel_plot(results: Results, panels: list[_Panel]) -> Plot:
    """The panels in two columns."""
    rows: PlotRows = []
    grid_rows = (len(panels) + 1) // 2
    figure: Figure
    figure, grid = subplots(7.2, 2.6 * grid_rows, grid_rows, 2)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for (metric, label), color in zip(panel.metrics.items(), (BLUE, ORANGE), strict=False):
            rows += _chain_line(axes, results, metric, color=color, dashes="solid", label=label)
        if panel.percent:
            _percent_axis(axes)
        axes.set_title(panel.title, fontsize="medium", loc="left")
        _iteration_axis(axes, results, names=False)
        if len(panel.metrics) > 1:
            axes.legend()
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    figure.subplots_adjust(wspace=0.25, hspace=0.5)
    return Plot(figure, rows)


def _has(results: Results, metric: str) -> bool:
    return any(results.estimate(arm.name, metric) is not None for arm in em_chain(results.arms))


def _row(arm: Arm, metric: str, estimate: Estimate) -> dict[str, Any]:
    return {
        "model": arm.name,
        "role": arm.role,
        "iteration": arm.iteration,
        "metric": metric,
        "value": estimate.value,
        "se": estimate.se,
    }


def _chain_line(
    axes: Axes, results: Results, metric: str, *, color: str, dashes: str, label: str = ""
) -> PlotRows:
    """Draw a metric of the chain with its standard errors; iterations without it are left out, and
    the line connects their neighbours."""
    candidates = [(arm, results.estimate(arm.name, metric)) for arm in em_chain(results.arms)]
    points = [(arm, estimate) for arm, estimate in candidates if estimate is not None]
    if points:
        errors = [estimate.se or 0.0 for _, estimate in points]
        axes.errorbar(
            [arm.iteration or 0 for arm, _ in points],
            [estimate.value for _, estimate in points],
            yerr=errors if any(errors) else None,
            color=color,
            marker="o",
            linestyle=dashes,
            label=label,
        )
    return [_row(arm, metric, estimate) for arm, estimate in points]


def _control_line(
    axes: Axes, results: Results, arm: Arm, estimate: Estimate, note: str = ""
) -> LineLabel:
    """Draw a control as a horizontal line with its standard error as a band; returns its label."""
    style = line_styles(results.arms)[arm.name]
    axes.axhline(estimate.value, color=style.color, linestyle=style.dashes, linewidth=1.2)
    if estimate.se:
        axes.axhspan(
            estimate.value - estimate.se,
            estimate.value + estimate.se,
            color=style.color,
            alpha=0.12,
            linewidth=0,
        )
    description = f"{arm.description}, {note}" if note else arm.description
    return LineLabel(estimate.value, f"{arm.name}: {description}", style.color)


def _percent_axis(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    top = axes.get_ylim()[1]
    axes.set_ylim(-0.03 * top, top)  # from 0, with a margin so that a marker at 0 is not cut


def _iteration_axis(axes: Axes, results: Results, *, names: bool = True) -> None:
    """A tick for each iteration, with the name of its model below."""
    chain = em_chain(results.arms)
    ticks = [f"{arm.iteration}\n{arm.name}" if names else f"{arm.iteration}" for arm in chain]
    axes.set_xticks(range(len(chain)), ticks)
    axes.set_xlim(-0.3, len(chain) - 0.7)
    axes.set_xlabel("iteration")
    axes.grid(visible=False, axis="x")
