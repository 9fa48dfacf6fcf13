"""Figures and report show the numbers of the metrics files, for models of any name."""

import csv
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from boltlm.reporting import curves, iterations
from boltlm.reporting.plotting import Plot
from boltlm.reporting.report import write_report
from boltlm.reporting.results import Results, read_results, run_points
from tests.reporting.experiment import chain_params, model, report_settings, write_metrics

LAPTOP = ("warmstart", "em1", "em2", "em3", "em4")
RENAMED = ("gpt", "first", "second")
FIGURES = {"elbo", "accuracy", "parts", "diagnostics", "training", "heldout", "log_weight"}


def write_figures(params: dict[str, Any], root: Path) -> Path:
    """The report's folder, written from the metrics under `root`."""
    out = root / "figures"
    write_report(report_settings(params), metrics=root / "metrics", out=out)
    return out


def results_of(params: dict[str, Any], root: Path) -> Results:
    return read_results(report_settings(params), root / "metrics")


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("chain", [LAPTOP, RENAMED])
def test_the_table_of_every_figure_has_the_numbers_of_the_metrics_files(
    tmp_path: Path, chain: Sequence[str]
) -> None:
    params = chain_params(chain)
    write_metrics(params, tmp_path)
    out = write_figures(params, tmp_path)
    assert {path.stem for path in out.glob("*.png")} == FIGURES
    assert {path.stem for path in out.glob("*.csv")} == FIGURES
    for stem in ("elbo", "accuracy", "parts", "diagnostics"):
        for row in read_rows(out / f"{stem}.csv"):
            metrics = json.loads((tmp_path / f"metrics/eval/{row['model']}.json").read_text())
            assert float(row["value"]) == metrics[row["metric"]]
            assert row["se"] == str(metrics.get(f"{row['metric']}_se", ""))
    bounds = {row["model"]: row for row in read_rows(out / "elbo.csv")}
    assert set(bounds) == set(params["models"])
    assert [bounds[name]["iteration"] for name in chain] == [str(t) for t in range(len(chain))]
    assert bounds["plain"]["metric"] == "nll_in_context_per_token"
    accuracies = read_rows(out / "accuracy.csv")
    spaces = {(row["model"], row["metric"].split("/")[2]) for row in accuracies}
    assert spaces >= {(name, space) for name in chain for space in ("latent", "raw")}
    assert len(read_rows(out / "parts.csv")) == 3 * len(chain)
    assert len(read_rows(out / "diagnostics.csv")) == 6 * len(chain)
    training = read_rows(out / "training.csv")
    assert [float(row["loss"]) for row in training if row["model"] == "mix"] == [
        6.0,
        3.5,
        5 / 3 + 1,
    ]


def test_the_histogram_shows_the_central_range_and_its_table_every_draw(tmp_path: Path) -> None:
    """A single outlier must neither compress the figure nor vanish from the numbers."""
    params = chain_params(RENAMED)
    write_metrics(params, tmp_path)
    table = read_rows(write_figures(params, tmp_path) / "log_weight.csv")
    assert {row["latents"] for row in table} == {"by_gpt", "by_first"}
    for name in ("by_gpt", "by_first"):
        assert sum(float(row["count"]) for row in table if row["latents"] == name) == 1401
    plot = curves.plot_log_weight(results_of(params, tmp_path))
    assert isinstance(plot, Plot)
    low, _ = plot.figure.axes[0].get_xlim()
    assert low > -32


def test_controls_are_drawn_at_their_bound_or_at_minus_their_nll_in_context(tmp_path: Path) -> None:
    params = chain_params(RENAMED)
    write_metrics(params, tmp_path)
    results = results_of(params, tmp_path)
    plot = iterations.plot_elbo(results)
    assert isinstance(plot, Plot)
    axes = plot.figure.axes[0]
    heights = {
        float(np.asarray(line.get_ydata())[0])
        for line in axes.lines
        if list(np.asarray(line.get_xdata())) == [0, 1]
    }
    controls = ("mix", "taught", "frozen_em")
    expected = {results.evaluation[name]["elbo_per_token"] for name in controls}
    assert heights == expected | {-results.evaluation["plain"]["nll_in_context_per_token"]}


def test_fractions_are_shown_in_percent(tmp_path: Path) -> None:
    params = chain_params(RENAMED)
    write_metrics(params, tmp_path)
    plot = iterations.plot_diagnostics(results_of(params, tmp_path))
    assert isinstance(plot, Plot)
    FigureCanvasAgg(plot.figure).draw()
    percent = {
        axes.get_title(loc="left"): axes.get_yticklabels()[-1].get_text().endswith("%")
        for axes in plot.figure.axes
    }
    assert percent == {
        "latents with the reference's numbers": True,
        "tokens per latent": False,
        "effective sample size (K = 4)": False,
        "distinct latents of a chunk": False,
        "masked probability": True,
    }


def test_labels_of_controls_with_equal_values_do_not_overlap(tmp_path: Path) -> None:
    params = chain_params(RENAMED)
    params["models"] |= {f"raw_{i}": model("split/em", "raw") for i in range(9)}
    write_metrics(params, tmp_path)
    for path in (tmp_path / "metrics/eval").glob("raw_*.json"):
        path.write_text(json.dumps({"nll_in_context_per_token": 1.5}))
    plot = iterations.plot_elbo(results_of(params, tmp_path))
    assert isinstance(plot, Plot)
    FigureCanvasAgg(plot.figure).draw()
    boxes = [text.get_window_extent() for text in plot.figure.axes[0].texts]
    assert len(boxes) == 13
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    params = chain_params(RENAMED)
    write_metrics(params, tmp_path)
    first = {path.name: path.read_bytes() for path in write_figures(params, tmp_path).iterdir()}
    second = {path.name: path.read_bytes() for path in write_figures(params, tmp_path).iterdir()}
    assert first == second


def test_the_report_names_every_model_and_links_every_figure(tmp_path: Path) -> None:
    params = chain_params(RENAMED)
    write_metrics(params, tmp_path)
    text = (write_figures(params, tmp_path) / "report.md").read_text()
    for name in (*params["models"], *params["latents"]):
        assert f"\n| {name} |" in text
    assert all(f"({stem}.png)" in text for stem in FIGURES)
    assert "| second | iteration 2 | −3.375 ± 0.020 | 1.172 ± 0.010 | 1.422 ± 0.010 |" in text
    assert "is skipped" not in text
    assert "| tuned | gsm8k/standard/latent | 25.0% ± 2.0% | 3.0% | – | 5 | 16 |" in text
    assert "absent" not in text
    assert "| second | 17.8% |" in text
    by_task = text.partition("### Accuracy by task\n")[2].partition("\n#")[0]
    assert "| second | 17.8% |" in by_task
    assert "| plain |" not in by_task, "it was given none of the tasks"
    assert "(44 of documents, 43 of questions)" in text
    assert "| model | K = 4 | K = 64 |\n" in text
    assert "| second | −4.312 | −3.375 |" in text


def test_what_has_no_numbers_is_skipped_with_its_reason(tmp_path: Path) -> None:
    """A report is written for a part of the graph, for a preset without a chain, and without any
    metrics at all."""
    params = chain_params(RENAMED)
    write_metrics(params, tmp_path)
    out = write_figures(params, tmp_path)
    (tmp_path / "metrics/eval/first.json").unlink()
    for path in (tmp_path / "metrics/train").iterdir():
        path.write_text(path.read_text().splitlines()[0] + "\n")
    write_figures(params, tmp_path)
    assert {path.stem for path in out.glob("*.png")} == FIGURES - {"training", "heldout"}
    assert not (out / "training.csv").exists()
    iterations_drawn = {row["iteration"] for row in read_rows(out / "elbo.csv") if row["iteration"]}
    assert iterations_drawn == {"0", "2"}
    assert "`training.png` is skipped: " in (out / "report.md").read_text()
    params |= {"models": {"plain": model("split/em", "raw")}, "latents": {}}
    params["finetune"] = {"runs": {}}
    write_figures(params, tmp_path)
    assert not list(out.glob("*.png"))
    assert (out / "report.md").read_text().count("is skipped: ") == len(FIGURES)
    assert (
        "| plain | raw text | – | 1.250 ± 0.010 | 1.500 ± 0.010 |"
        in (out / "report.md").read_text()
    )
    text = (write_figures(chain_params(LAPTOP), tmp_path / "empty") / "report.md").read_text()
    assert text.count("is skipped: ") == len(FIGURES)


def test_validation_curves_show_the_values_and_the_best_so_far(tmp_path: Path) -> None:
    """As in the paper: a likelihood that gets worse leaves the line where it was. A model without
    a bound has no line for it."""
    write_metrics(chain_params(LAPTOP), tmp_path)
    rows = read_rows(write_figures(chain_params(LAPTOP), tmp_path) / "heldout.csv")
    points = {(row["model"], row["metric"], row["tokens"]): row for row in rows}
    worse, better = points["plain", "val_nll", "300.0"], points["mix", "val_nll", "300.0"]
    assert (worse["value"], worse["best"]) == ("2.75", "2.5")
    assert (better["value"], better["best"]) == ("1.75", "1.75")
    assert points["mix", "val_elbo", "300.0"]["best"] == "-4.0"
    assert ("plain", "val_elbo", "300.0") not in points


def test_curves_of_snapshots_by_training_tokens_and_by_raw_tokens(tmp_path: Path) -> None:
    """Every point with its error, and the best value so far: of an NLL the lowest. Two panels for
    each metric that has a better and a worse; without entries of `curves` there is no figure and
    no word of it."""
    params = chain_params(LAPTOP)
    write_metrics(params, tmp_path)
    assert "napshots" not in (write_figures(params, tmp_path) / "report.md").read_text()
    entry = {"likelihood": True, "documents": None, "evaluate": {}}
    params["curves"] = {"em1": entry, "plain": entry}
    text = (write_figures(params, tmp_path) / "report.md").read_text()
    assert "no snapshots were evaluated" in text
    lines = {
        "em1": ["4,400,300,elbo_per_token,-2.0,0.5", "8,800,600,elbo_per_token,-3.0,0.25"],
        "plain": ["4,400,390,nll_per_token,1.5,0.5", "8,800,780,nll_per_token,1.25,"],
    }
    (tmp_path / "metrics/curves").mkdir()
    for name, rows in lines.items():
        text = "\n".join(["step,tokens,raw_tokens,metric,value,se", *rows, "8,800,1,diversity,3,"])
        (tmp_path / f"metrics/curves/{name}.csv").write_text(text + "\n")
    out = write_figures(params, tmp_path)
    found = {(row["model"], row["step"]): row for row in read_rows(out / "snapshots.csv")}
    for name, rows in lines.items():
        for line in rows:
            row = found[name, line[0]]
            assert [row[field] for field in ("step", "tokens", "raw_tokens", "metric")] == (
                line.split(",")[:4]
            )
            assert [row["value"], row["se"]] == line.split(",")[4:]
    assert [found["em1", step]["best"] for step in "48"] == ["-2.0", "-2.0"]
    assert [found["plain", step]["best"] for step in "48"] == ["1.5", "1.25"]
    assert len(found) == 4
    plot = curves.plot_snapshots(results_of(params, tmp_path))
    assert isinstance(plot, Plot)
    panels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in plot.figure.axes]
    assert panels == [
        (label, metric)
        for label in ("training tokens", "raw tokens seen")
        for metric in ("elbo_per_token", "nll_per_token")
    ]
    best = plot.figure.axes[2].lines[-1].get_xydata()
    assert np.asarray(best).tolist() == [[300, -2], [600, -2]]
    assert ("elbo_per_token", -3.0, 8) in run_points(results_of(params, tmp_path))["curves/em1"]


def test_the_base_model_is_a_row_and_a_control(tmp_path: Path) -> None:
    """Although it is no entry of `models`; its training curve keeps a panel of its own."""
    params = chain_params(RENAMED)
    write_metrics(params, tmp_path)
    accuracies = {f"questions/standard/{s}/accuracy": v for s, v in (("cot", 0.125), ("raw", 0.0))}
    metrics = {"nll_in_context_per_token": 2.5, **accuracies}
    (tmp_path / "metrics/eval/base.json").write_text(json.dumps(metrics))
    curve = (tmp_path / "metrics/train/plain.csv").read_text()
    (tmp_path / "metrics/train/base.csv").write_text(curve)
    out = write_figures(params, tmp_path)
    text = (out / "report.md").read_text()
    assert "| base | base model | – | 2.500 | – | – | 12.5% | 0.0% |" in text
    (row,) = (row for row in read_rows(out / "accuracy.csv") if row["model"] == "base")
    assert (row["metric"], row["value"]) == ("questions/standard/cot/accuracy", "0.125")
    plot = curves.plot_training(results_of(params, tmp_path))
    assert isinstance(plot, Plot)
    panels = [len(axes.lines) for axes in plot.figure.axes]
    assert panels == [1, len(params["models"])]
