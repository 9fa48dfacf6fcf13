"""Figures and report show the numbers of the metrics files, for models of any name."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from boltlm.reporting import curves
from boltlm.reporting.experiment import Experiment
from boltlm.reporting.figures import FIGURES
from boltlm.reporting.iterations import draw_by_iteration
from boltlm.reporting.plotting import STYLE, Plot, SkippedPlot, save_plot
from boltlm.reporting.quantities import likelihood, of_metric
from boltlm.reporting.report import render_report, unusable_latents, write_report
from boltlm.reporting.results import Results, read_results
from tests.reporting.experiment import chain_params, model, report_settings, write_metrics

LAPTOP = ("warmstart", "em1", "em2", "em3", "em4")
CHAIN = ("gpt", "first", "second")
DRAWN = {"elbo", "accuracy", "nll", "parts", "bounds", "diagnostics", "training", "heldout"}
DRAWN |= {"log_weight", "finetuned"}
NO_PLOTS = {spec.stem: SkippedPlot("not drawn here") for spec in FIGURES}


def results_of(params: dict[str, Any], root: Path) -> Results:
    return read_results(report_settings(params), root / "metrics")


def plots_of(params: dict[str, Any], root: Path) -> dict[str, Plot | SkippedPlot]:
    """Every figure, drawn but not saved."""
    experiment = Experiment(report_settings(params), results_of(params, root))
    with rc_context(dict(STYLE)):
        return {spec.stem: spec.draw(experiment) for spec in FIGURES}


def plot_of(params: dict[str, Any], root: Path, stem: str) -> Plot:
    experiment = Experiment(report_settings(params), results_of(params, root))
    (spec,) = (spec for spec in FIGURES if spec.stem == stem)
    with rc_context(dict(STYLE)):
        plot = spec.draw(experiment)
    assert isinstance(plot, Plot), plot.reason
    return plot


def change(path: Path, **metrics: float | None) -> None:
    """Set metrics of a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | metrics))


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of an experiment whose figures are in `figures`."""
    root = tmp_path_factory.mktemp("experiment")
    write_metrics(chain_params(CHAIN), root)
    settings = report_settings(chain_params(CHAIN))
    write_report(settings, metrics=root / "metrics", out=root / "figures")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An experiment whose metrics a test may change."""
    write_metrics(chain_params(CHAIN), tmp_path)
    return tmp_path


def test_the_table_of_every_figure_has_the_numbers_of_the_metrics_files(written: Path) -> None:
    out, params = written / "figures", chain_params(CHAIN)
    for suffix in ("png", "svg", "csv"):
        assert {path.stem for path in out.glob(f"*.{suffix}")} == DRAWN
    for stem in ("elbo", "accuracy", "parts", "diagnostics"):
        for row in read_rows(out / f"{stem}.csv"):
            metrics = json.loads((written / f"metrics/eval/{row['model']}.json").read_text())
            sign = -1 if row["metric"] == "nll_in_context_per_token" else 1
            assert float(row["value"]) == sign * metrics[row["metric"]]
            assert row["se"] == str(metrics.get(f"{row['metric']}_se", ""))
    bounds = {row["model"]: row for row in read_rows(out / "elbo.csv")}
    assert set(bounds) == set(params["models"])
    assert [bounds[name]["iteration"] for name in CHAIN] == ["0", "1", "2"]
    assert bounds["plain"]["metric"] == "nll_in_context_per_token"
    spaces = {
        (row["model"], row["metric"].split("/")[2]) for row in read_rows(out / "accuracy.csv")
    }
    assert {space for name, space in spaces if name in CHAIN} == {"latent"}
    assert ("plain", "raw") in spaces
    assert len(read_rows(out / "parts.csv")) == 4 * len(CHAIN)
    training = read_rows(out / "training.csv")
    losses = [float(row["loss"]) for row in training if row["model"] == "mix"]
    assert losses == [6.0, 3.5, 5 / 3 + 1]
    (tuned,) = read_rows(out / "finetuned.csv")
    assert (tuned["model"], tuned["value"], tuned["se"]) == ("gpt", "0.25", "0.03")


def test_the_histogram_has_few_bins_and_its_table_every_draw(root: Path) -> None:
    """A single outlier must neither compress the figure nor vanish from the numbers; a range of
    hundreds of nats has no more bins than one of ten."""
    plot = plot_of(chain_params(CHAIN), root, "log_weight")
    counts = [row["count"] for row in plot.rows if row["latents"] == "by_gpt"]
    assert sum(counts) == 1401
    low, high = plot.figure.axes[0].get_xlim()
    assert low > -32
    assert "per 0.5 nats" in plot.figure.axes[0].get_ylabel()
    lines = [f"{low},{low + 0.5},1" for low in np.arange(-1700, 1600, 0.5)]
    text = "\n".join(["from_nats,to_nats,count", *lines])
    for path in (root / "metrics/latents").glob("*.csv"):
        path.write_text(text)
    plot = plot_of(chain_params(CHAIN), root, "log_weight")
    rows = [row for row in plot.rows if row["latents"] == "by_gpt"]
    assert sum(row["count"] for row in rows) == 6600
    assert {row["to_nats"] - row["from_nats"] for row in rows} == {50}
    low, high = plot.figure.axes[0].get_xlim()
    assert (high - low) / 50 <= curves.MAX_BINS


def test_controls_are_drawn_at_their_bound_or_at_minus_their_nll_in_context(root: Path) -> None:
    change(root / "metrics/eval/plain.json", nll_in_context_per_token=3.25)
    results = results_of(chain_params(CHAIN), root)
    plot = draw_by_iteration(results, [likelihood()])
    assert isinstance(plot, Plot)
    lines = plot.figure.axes[0].lines
    ends = [line for line in lines if list(np.asarray(line.get_xdata())) == [0, 1]]
    expected = {results.evaluation[n]["elbo_per_token"] for n in ("mix", "taught", "frozen_em")}
    expected.add(-results.evaluation["plain"]["nll_in_context_per_token"])
    assert {float(np.asarray(line.get_ydata())[0]) for line in ends} == expected


def test_a_value_far_outside_is_named_and_not_drawn(root: Path) -> None:
    change(root / "metrics/eval/taught.json", elbo_per_token=-900.0)
    change(root / "metrics/eval/plain.json", nll_in_context_per_token=3.25)
    plot = plot_of(chain_params(CHAIN), root, "elbo")
    (axes,) = plot.figure.axes
    assert axes.get_xlabel() == "iteration\n(not shown: taught −900.000)"
    assert plot.figure.axes[0].get_ylim()[0] > -20
    assert -900.0 in [row["value"] for row in plot.rows]


def tick_labels(axes: Axes) -> list[str]:
    figure = axes.figure
    assert figure is not None
    FigureCanvasAgg(figure.get_figure(root=True)).draw()  # type: ignore[arg-type]
    assert axes.yaxis.get_major_formatter().get_offset() == ""  # type: ignore[attr-defined]
    return [label.get_text() for label in axes.get_yticklabels()]


def test_equal_values_are_not_blown_up_and_have_no_offset(root: Path) -> None:
    for index, name in enumerate(CHAIN):
        values = {"elbo_per_token": 1.0 + 1e-7 * index, "elbo_per_token_se": 1e-9}
        change(root / f"metrics/eval/{name}.json", **values)
    results = results_of(chain_params(CHAIN), root)
    with rc_context(dict(STYLE)):
        plot = draw_by_iteration(results, [likelihood()], controls=False)
        assert isinstance(plot, Plot)
        (axes,) = plot.figure.axes
        assert all(0.98 < float(label) < 1.02 for label in tick_labels(axes))
    low, high = axes.get_ylim()
    assert high - low == pytest.approx(0.02, rel=0.1)


def test_fractions_are_percent_from_0_and_counts_begin_at_0(root: Path) -> None:
    plot = plot_of(chain_params(CHAIN), root, "diagnostics")
    panels = {axes.get_title(loc="left"): axes for axes in plot.figure.axes}
    assert panels["masked probability"].get_ylabel() == "%"
    assert panels["masked probability"].get_ylim()[0] < 0
    assert set(tick_labels(panels["right numbers in a latent"])) >= {"0", "10"}
    assert panels["length of a latent"].get_ylabel() == "tokens"
    assert panels["length of a latent"].get_ylim()[0] == 0
    assert panels["effective sample size"].get_ylabel() == "draws"


def test_the_same_numbers_give_the_same_bytes(root: Path) -> None:
    for folder in ("one", "two"):
        (root / folder).mkdir()
        save_plot(root / folder, "elbo", plot_of(chain_params(CHAIN), root, "elbo"))
    for suffix in ("png", "svg", "csv"):
        first, second = ((root / f / f"elbo.{suffix}").read_bytes() for f in ("one", "two"))
        assert first == second
        assert b"date" not in first.lower()
    save_plot(root / "two", "elbo", SkippedPlot("no numbers any more"))
    assert not list((root / "two").iterdir())


def test_the_report_names_every_model_and_links_every_figure(written: Path) -> None:
    text, params = (written / "figures/report.md").read_text(), chain_params(CHAIN)
    for name in (*params["models"], *params["latents"]):
        assert f"\n| {name} |" in text
    assert all(f"({stem}.{suffix})" in text for stem in DRAWN for suffix in ("png", "svg", "csv"))
    assert "| second | iteration 2 | −3.375 ± 0.020 | 1.172 ± 0.010 | 1.422 ± 0.010 |" in text
    assert "| tuned | gsm8k/standard/latent | 25.0% ± 2.0% | 3.0% | – | 5 | 16 |" in text
    assert "absent" not in text
    by_task = text.partition("### Accuracy by task\n")[2].partition("\n#")[0]
    assert "| second | 17.8% |" in by_task
    assert "| plain |" not in by_task, "it was given none of the tasks"
    assert "(44 of documents, 43 of questions)" in text
    assert "| model | K = 4 | K = 64 |\n" in text
    assert "| second | −4.312 | −3.375 |" in text
    assert text.count("± one standard error: over trainings") == 5  # captions


def test_what_has_no_numbers_is_skipped_with_its_reason(root: Path) -> None:
    """A report is written for a part of the graph, for a preset without a chain, and without any
    metrics at all."""
    (root / "metrics/eval/first.json").unlink()
    for path in (root / "metrics/train").iterdir():
        path.write_text(path.read_text().splitlines()[0] + "\n")
    params = chain_params(CHAIN)
    plots = plots_of(params, root)
    assert {stem for stem, plot in plots.items() if isinstance(plot, Plot)} == DRAWN - {
        "training",
        "heldout",
    }
    elbo = plots["elbo"]
    assert isinstance(elbo, Plot)
    assert {row["iteration"] for row in elbo.rows} == {0, 2, None}
    report = render_report(results_of(params, root), plots)
    assert "- `training`, Training loss by training tokens" in report
    assert "model has a training curve." in report
    params |= {"models": {"plain": model("split/em", "raw")}, "latents": {}}
    params["finetune"] = {"runs": {}}
    plots = plots_of(params, root)
    report = render_report(results_of(params, root), plots)
    drawn = {stem for stem, plot in plots.items() if isinstance(plot, Plot)}
    assert drawn == {"table_1"}  # it has the accuracy of the only model
    for stem, plot in plots.items():
        if not isinstance(plot, SkippedPlot):
            continue
        assert f"- `{stem}`, " in report
        assert f": {plot.reason}." in report
    assert "| plain | raw text | – | 1.250 ± 0.010 | 1.500 ± 0.010 |" in report
    plots = plots_of(chain_params(LAPTOP), root / "empty")
    assert not any(isinstance(plot, Plot) for plot in plots.values())


def test_a_bound_of_cut_draws_or_of_one_cluster_is_marked(root: Path) -> None:
    """With a dagger and a footnote in the tables, and a hollow marker in the figure."""
    params = chain_params(CHAIN)
    assert "†" not in render_report(results_of(params, root), NO_PLOTS)
    change(root / "metrics/eval/second.json", forced_fraction=0.4)
    change(root / "metrics/eval/first.json", heldout_clusters=1, elbo_per_token_se=None)
    text = render_report(results_of(params, root), NO_PLOTS)
    assert "| second | iteration 2 | −3.375 ± 0.020† |" in text
    assert "| first | iteration 1 | −3.500‡ |" in text
    assert "†: more than 5% of the draws behind the bound were cut" in text
    plot = plot_of(params, root, "elbo")
    assert {row["model"] for row in plot.rows if row["doubtful"]} == {"first", "second"}
    hollow = [x for x in plot.figure.axes[0].lines if x.get_markerfacecolor() == "white"]
    assert np.asarray(hollow[0].get_xdata()).tolist() == [1, 2]


def test_latents_most_of_which_are_cut_are_a_loud_warning(root: Path) -> None:
    params = chain_params(CHAIN)
    change(root / "metrics/latents/by_gpt.json", forced_fraction=0.5)
    assert unusable_latents(results_of(params, root)) == []
    change(root / "metrics/latents/by_gpt.json", forced_fraction=0.75)
    results = results_of(params, root)
    (warning,) = unusable_latents(results)
    assert warning.startswith("latents by_gpt: 75% of the draws did not end")
    text = render_report(results, NO_PLOTS)
    assert text.splitlines()[4] == f"**Warning: {warning}**"


def test_validation_curves_show_the_values_and_the_best_so_far(tmp_path: Path) -> None:
    """As in the paper: a likelihood that gets worse leaves the line where it was. A model without
    a bound has no line for it."""
    write_metrics(chain_params(LAPTOP), tmp_path)
    rows = plot_of(chain_params(LAPTOP), tmp_path, "heldout").rows
    points = {(row["model"], row["metric"], row["tokens"]): row for row in rows}
    worse, better = points["plain", "val_nll", 300.0], points["mix", "val_nll", 300.0]
    assert (worse["value"], worse["best"]) == (2.75, 2.5)
    assert (better["value"], better["best"]) == (1.75, 1.75)
    assert points["mix", "val_elbo", 300.0]["best"] == -4.0
    assert ("plain", "val_elbo", 300.0) not in points


def test_several_trainings_of_a_model_are_one_point_with_their_standard_error(root: Path) -> None:
    """Mean and s/√n by hand: of −3.5 and −2.5 it is −3 ± 0.5. The second training is no control."""
    params = chain_params(CHAIN)
    params["models"]["again"] = {**params["models"]["first"], "seed": 7}
    values = json.loads((root / "metrics/eval/first.json").read_text()) | {"elbo_per_token": -2.5}
    (root / "metrics/eval/again.json").write_text(json.dumps(values))
    rows = {row["model"]: row for row in plot_of(params, root, "elbo").rows}
    first = rows["first"]
    assert (first["value"], first["se"], first["n"]) == (-3.0, pytest.approx(0.5), 2)
    assert "again" not in rows


def test_the_base_model_is_a_row_and_a_control(root: Path) -> None:
    """Although it is no entry of `models`; its training curve keeps a panel of its own."""
    params = chain_params(CHAIN)
    accuracies = {f"questions/standard/{s}/accuracy": v for s, v in (("cot", 0.125), ("raw", 0.0))}
    metrics = {"nll_in_context_per_token": 2.5, **accuracies}
    (root / "metrics/eval/base.json").write_text(json.dumps(metrics))
    curve = (root / "metrics/train/plain.csv").read_text()
    (root / "metrics/train/base.csv").write_text(curve)
    results = results_of(params, root)
    text = render_report(results, NO_PLOTS)
    assert "| base | base model | – | 2.500 | – | – | 12.5% | 0.0% |" in text
    (row,) = (r for r in plot_of(params, root, "accuracy").rows if r["model"] == "base")
    assert (row["metric"], row["value"]) == ("questions/standard/cot/accuracy", 0.125)
    panels = [len(axes.lines) for axes in plot_of(params, root, "training").figure.axes]
    assert panels == [1, len(params["models"])]


def test_metrics_that_nobody_declared_keep_their_name() -> None:
    assert of_metric("elbo_per_token_k4").label == "ELBO (K = 4)"
    assert of_metric("dclm/nll_per_token").label == "NLL of raw text on dclm"
    quantity = of_metric("some/odd_thing")
    assert (quantity.label, quantity.unit, quantity.direction) == ("some/odd_thing", "", 0)
