"""Each preset of the paper's experiments draws the paper's figures, from metrics that are made up
in the form in which the stages write them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from matplotlib import rc_context

from boltlm.evaluation.curve_points import read_curves
from boltlm.params import build_settings, load
from boltlm.reporting.experiment import Experiment, FigureSettings
from boltlm.reporting.figures import FIGURES
from boltlm.reporting.plotting import STYLE, Plot, SkippedPlot
from boltlm.reporting.results import read_results
from tests.reporting.fabricated import DIP, STEPS, fabricate, fabricate_means
from tests.tiny import ROOT

PRESETS = ("paper-compare", "paper-fixed", "paper-continual")
EVERYWHERE = {"nll", "accuracy_exact", "accuracy_synthetic", "general", "likelihood", "prompts"}
CHAINS = {"elbo", "accuracy", "parts", "bounds", "diagnostics", "log_weight", "training"}
DRAWN = {
    "paper-compare": {"methods", "table_1", "mix_raw", "methods_raw_tokens", "training"},
    "paper-fixed": {"iterations", "finetuned", "k_samples", "seeds", *CHAINS},
    "paper-continual": {"continual", "continual_raw_tokens", *CHAINS},
}
METHODS = ["latent", "unpaired", "raw_repeat", "raw_fresh", "wrap_orig", "wrap_cot"]
TASKS = ["MATH", "GSM8K", "MMLU-STEM"]


class Drawn(NamedTuple):
    root: Path
    params: dict[str, Any]
    plots: dict[str, Plot | SkippedPlot]

    def plot(self, stem: str) -> Plot:
        plot = self.plots[stem]
        assert isinstance(plot, Plot), plot.reason
        return plot

    def metrics(self, name: str) -> dict[str, float]:
        return json.loads((self.root / "metrics/eval" / f"{name}.json").read_text())


def drawn(preset: str, root: Path) -> Drawn:
    params = load(ROOT / "presets" / f"{preset}.yaml")
    fabricate(params, root)
    if preset == "paper-fixed":
        fabricate_means(params, root, "em1")
    settings = build_settings(FigureSettings, params)
    experiment = Experiment(settings, read_results(settings, root / "metrics"))
    with rc_context(dict(STYLE)):
        plots = {spec.stem: spec.draw(experiment) for spec in FIGURES}
    return Drawn(root, params, plots)


@pytest.fixture(scope="module")
def all_drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drawn]:
    """The figures of each preset, drawn but not saved."""
    return {preset: drawn(preset, tmp_path_factory.mktemp(preset)) for preset in PRESETS}


@pytest.fixture(params=PRESETS)
def any_preset(request: pytest.FixtureRequest, all_drawn: dict[str, Drawn]) -> Drawn:
    return all_drawn[request.param]


@pytest.fixture
def compare(all_drawn: dict[str, Drawn]) -> Drawn:
    return all_drawn["paper-compare"]


@pytest.fixture
def fixed(all_drawn: dict[str, Drawn]) -> Drawn:
    return all_drawn["paper-fixed"]


def legend_of(plot: Plot) -> list[str]:
    return [text.get_text().partition(":")[0] for text in plot.figure.legends[0].get_texts()]


def test_a_preset_of_the_paper_draws_its_figures(any_preset: Drawn) -> None:
    """What it does not draw has its reason; axes have labels, those of y a unit; legends have the
    models in one order; every curve has its band."""
    preset = next(name for name in PRESETS if any_preset.root.name.startswith(name))
    found = {stem for stem, plot in any_preset.plots.items() if isinstance(plot, Plot)}
    assert found == DRAWN[preset] | EVERYWHERE
    order = [*any_preset.params["models"], "base"]
    for stem in found:
        plot = any_preset.plot(stem)
        for axes in plot.figure.axes:
            assert axes.get_xlabel(), stem
            units = ("%", "nats", "tokens", "draws", "latents")
            labels = f"{axes.get_ylabel()} {axes.get_xlabel()}"
            assert any(unit in labels for unit in units), (stem, labels)
        names = legend_of(plot) if plot.figure.legends else []
        models = [name for name in names if name in order]
        if stem not in ("mix_raw", "log_weight"):
            assert models == sorted(models, key=order.index), stem
    for stem in ("accuracy_exact", "general", "likelihood"):
        for axes in any_preset.plot(stem).figure.axes:
            curves = [line for line in axes.lines if ":" in str(line.get_label())]
            assert len(axes.collections) == len(curves) > 0, stem


def test_every_point_of_a_curve_is_that_of_its_file(any_preset: Drawn) -> None:
    for row in any_preset.plot("accuracy_exact").rows:
        points = read_curves(any_preset.root / f"metrics/curves/{row['model']}.csv")
        (point,) = (p for p in points if p.metric == row["metric"] and p.tokens == row["tokens"])
        assert (point.value, point.se, point.raw_tokens) == (
            row["value"],
            row["se"],
            row["raw_tokens"],
        )


def test_methods_are_compared_without_the_mixtures(compare: Drawn) -> None:
    plot = compare.plot("methods")
    assert legend_of(plot) == METHODS
    assert [axes.get_title(loc="left").partition(",")[0] for axes in plot.figure.axes] == TASKS
    assert {axes.get_xlabel() for axes in plot.figure.axes} == {"training tokens, billions"}
    raw = compare.plot("methods_raw_tokens")
    assert {axes.get_xlabel() for axes in raw.figure.axes} == {"raw tokens seen, millions"}
    colors = [line.get_color() for line in plot.figure.axes[0].lines if line.get_label() != ""]
    assert len({color for color in colors if isinstance(color, str)}) >= len(METHODS)
    for row in plot.rows:
        space = "latent" if row["model"] == "latent" else "raw"
        assert row["metric"].endswith(f"{space}/accuracy")


def test_the_best_so_far_stays_where_a_snapshot_is_worse(compare: Drawn) -> None:
    rows = [row for row in compare.plot("nll").rows if row["model"] == "latent"]
    rows = [row for row in rows if row["metric"] == "nll_per_token"]
    exact, best = ([r["value"] for r in rows if r["shown"] == s] for s in ("exact", "best"))
    assert exact[DIP] > exact[DIP - 1] == best[DIP] == best[DIP - 1]
    assert len(exact) == len(STEPS)
    assert best[-1] == exact[-1]
    errors = [r["se"] for r in rows if r["shown"] == "best"]
    assert errors[DIP] == errors[DIP - 1]


def test_table_1_has_the_papers_values_where_the_setting_is_the_papers(compare: Drawn) -> None:
    plot = compare.plot("table_1")
    marks = [line for line in plot.figure.axes[0].lines if line.get_label() == "the paper's value"]
    (values,) = (sorted(np.asarray(line.get_xdata()).tolist()) for line in marks)
    assert values == [0.0574, 0.1106, 0.1118, 0.1936, 0.2238, 0.2538]
    last = {(r["panel"], r["model"]): r for r in plot.rows if r["series"] == "last model"}
    metrics = compare.metrics("wrap_cot")
    row = last["GSM8K", "wrap_cot"]
    assert row["value"] == metrics["gsm8k/standard/raw/accuracy"]
    assert row["se"] == metrics["gsm8k/standard/raw/accuracy_se"]
    plain = {r["model"] for r in plot.rows if r["series"].endswith("plain text")}
    assert plain == {"latent", "latent_mix25", "latent_mix50"}
    settings = build_settings(FigureSettings, compare.params)
    assert Experiment(settings, read_results(settings, compare.root / "metrics")).is_papers
    params = compare.params | {"base": {"kind": "checkpoint", "model": "some/other"}}
    other = build_settings(FigureSettings, params)
    assert not Experiment(other, read_results(other, compare.root / "metrics")).is_papers


def test_mixtures_are_lines_over_the_share_of_raw_text(compare: Drawn) -> None:
    rows = compare.plot("mix_raw").rows
    for family in ("latent", "wrap_orig", "wrap_cot"):
        math = [r for r in rows if r["family"] == family and r["metric"].startswith("math/")]
        assert [row["x"] for row in math] == [0, 25, 50]
        for row, name in zip(math, (family, f"{family}_mix25", f"{family}_mix50"), strict=True):
            assert row["value"] == compare.metrics(name)[row["metric"]]


def test_prompt_sets_stand_side_by_side(compare: Drawn) -> None:
    rows = {(r["panel"], r["series"], r["model"]): r for r in compare.plot("prompts").rows}
    metrics = compare.metrics("raw_fresh")
    for prompts in ("standard", "synthetic"):
        row = rows["MATH", prompts, "raw_fresh"]
        assert row["value"] == metrics[f"math/{prompts}/raw/accuracy"]


def test_k_is_drawn_from_collected_experiments_and_this_one(fixed: Drawn) -> None:
    """Means over three seeds, by hand: the second seed is the mean, and s/√3 = 0.01/√3."""
    rows = [r for r in fixed.plot("k_samples").rows if r["metric"] == "elbo_per_token"]
    collected = [r for r in rows if r["family"] == "collected experiments"]
    assert [row["x"] for row in collected] == [1, 2, 4, 8]
    assert [row["value"] for row in collected] == pytest.approx([-0.88, -0.78, -0.68, -0.58])
    assert [row["se"] for row in collected] == pytest.approx([0.01 / 3**0.5] * 4)
    (own,) = (row for row in rows if row["family"] == "this experiment")
    assert (own["x"], own["value"]) == (4, fixed.metrics("em1")["elbo_per_token"])


def test_seeds_have_their_interval_and_each_its_line(fixed: Drawn) -> None:
    """t of two degrees of freedom is 4.303."""
    plot = fixed.plot("seeds")
    (em1,) = (r for r in plot.rows if r["model"] == "em1" and r["metric"] == "elbo_per_token")
    assert em1["half_width"] == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    single = [line for line in plot.figure.axes[0].lines if line.get_linewidth() < 1]
    assert len(single) == 3


def test_parts_of_the_bound_have_the_papers_values_per_document(fixed: Drawn) -> None:
    axes = {
        (a.get_title(loc="left").partition(",")[0], a.get_ylabel()): a
        for a in fixed.plot("parts").figure.axes
    }
    assert {unit for name, unit in axes if name == "utility"} == {
        "nats per chunk",
        "nats per document",
    }
    for panel, values in (("utility", [-1290, -1320]), ("simplicity", [-3090, -2920])):
        lines = axes[panel, "nats per document"].lines
        (mark,) = (line for line in lines if line.get_label() == "the paper's value")
        assert np.asarray(mark.get_xydata()).tolist() == [[1, values[0]], [4, values[1]]]
    assert not [
        line
        for line in axes["utility", "nats per chunk"].lines
        if line.get_label() == "the paper's value"
    ]


def test_fine_tuned_models_have_the_larger_of_the_two_errors(fixed: Drawn) -> None:
    rows = fixed.plot("finetuned").rows
    assert {row["panel"] for row in rows} == {"MATH", "GSM8K"}
    assert {row["se"] for row in rows} == {0.02}
    assert [r["model"] for r in rows if r["panel"] == "MATH"] == [
        *("warmstart", "em1", "em2", "em3", "em4"),
        *("raw_tokens", "raw_flops"),
    ]


def test_continual_curves_go_on_from_their_parents(all_drawn: dict[str, Drawn]) -> None:
    continual = all_drawn["paper-continual"]
    plot = continual.plot("continual")
    first = {row["model"]: row["tokens"] for row in reversed(plot.rows)}
    parents = {name: entry["parent"] for name, entry in continual.params["models"].items()}
    last = {row["model"]: row["tokens"] for row in plot.rows}
    for name, tokens in first.items():
        assert tokens > last.get(parents[name], 0)
