"""The few numbers for `dvc exp show`, `dvc plots show` and the experiment's run in MLflow."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from boltlm.reporting.headline import (
    CHAIN_SERIES,
    MAX_CURVE_LINES,
    headline_points,
    summary_numbers,
    write_summary,
)
from boltlm.reporting.results import Results, read_results
from tests.reporting.experiment import (
    chain_params,
    model,
    report_params,
    report_settings,
    write_metrics,
)
from tests.tiny import ROOT

DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))


def results_of(root: Path, params: dict[str, Any]) -> Results:
    write_metrics(params, root)
    return read_results(report_settings(params), root / "metrics")


@pytest.mark.parametrize("length", [2, 4, 12])
def test_a_chain_of_any_length_has_few_numbers(tmp_path: Path, length: int) -> None:
    """M_0, the last three models, and the best baseline of each kind: at most 15 in all."""
    chain = [f"m{index}" for index in range(length)]
    results = results_of(tmp_path, chain_params(chain))
    numbers = summary_numbers(results)
    assert sum(map(len, numbers.values())) <= 15
    shown = {name for name in numbers["elbo"] if not name.startswith("best_")}
    assert shown == {chain[0], *chain[1:][-3:]}
    for name in shown:
        assert numbers["elbo"][name] == results.evaluation[name]["elbo_per_token"]
        assert numbers["ess"][name] == results.evaluation[name]["ess_mean"]
    values = [-results.evaluation["plain"]["nll_in_context_per_token"]]
    assert numbers["elbo"]["best_raw"] == values[0], "raw text has a likelihood, no bound"
    assert {"best_teacher", "best_frozen", "best_raw"} <= numbers["elbo"].keys()


def test_mlflow_gets_few_metrics_with_the_iteration_as_step(tmp_path: Path) -> None:
    chain = ["zero", "one", "two"]
    results = results_of(tmp_path, chain_params(chain))
    points = headline_points(results)
    assert len({point.metric for point in points}) <= 15
    for metric, key in (
        ("elbo", "elbo_per_token"),
        ("accuracy", "questions/standard/latent/accuracy"),
        ("accuracy_raw", "questions/standard/raw/accuracy"),
        ("ess", "ess_mean"),
        ("right_latents", "numbers_match"),
        ("elbo_large_k", "subset/elbo_per_token_k64"),
    ):
        values = {point.step: point.value for point in points if point.metric == metric}
        expected = {t: results.evaluation[name][key] for t, name in enumerate(chain)}
        assert values == expected, metric


def test_without_a_chain_models_are_told_apart_by_name(tmp_path: Path) -> None:
    models = {f"raw{index}": model("split/em", "raw") for index in range(7)}
    models["taught"] = model("teacher/all")
    results = results_of(tmp_path, report_params(models, {}))
    names = {point.metric for point in headline_points(results)}
    assert "elbo/raw0" in names
    assert len(names) <= 15
    assert {point.step for point in headline_points(results)} == {0}


def test_of_several_tasks_the_corpus_s_own_questions_count(tmp_path: Path) -> None:
    """And where the experiment has none, the first benchmark."""
    params = chain_params(["zero", "one"])
    write_metrics(params, tmp_path)
    for path in (tmp_path / "metrics/eval").glob("*.json"):
        metrics = json.loads(path.read_text())
        kept = {key: value for key, value in metrics.items() if "questions/" not in key}
        path.write_text(json.dumps(kept))
    results = read_results(report_settings(params), tmp_path / "metrics")
    assert summary_numbers(results)["accuracy"] == {
        name: results.evaluation[name]["math/synthetic/latent/accuracy"] for name in ("zero", "one")
    }


def test_the_tables_that_dvc_draws_have_the_columns_that_it_draws(tmp_path: Path) -> None:
    """The chain is a line by iteration, a baseline a horizontal one; long curves are thinned."""
    params = chain_params(["zero", "one", "two"])
    write_metrics(params, tmp_path)
    lines = "".join(f"{step},{10 * step},1.5\n" for step in range(1, 1001))
    (tmp_path / "metrics/train/two.csv").write_text(f"step,tokens,loss\n{lines}")
    results = read_results(report_settings(params), tmp_path / "metrics")
    write_summary(results, tmp_path / "metrics/summary.json", tmp_path / "metrics/plots")
    assert json.loads((tmp_path / "metrics/summary.json").read_text()) == summary_numbers(results)
    tables: dict[str, list[dict[str, str]]] = {}
    for plot in DVC["plots"]:
        ((title, drawn),) = plot.items()
        ((path, column),) = drawn["y"].items()
        with (tmp_path / path).open() as file:
            tables[title] = list(csv.DictReader(file))
        for row in tables[title]:
            assert row.keys() == {drawn["x"], column, "series"}
            assert all(row.values())
    elbo = tables["elbo by iteration"]
    chain = [float(row["elbo"]) for row in elbo if row["series"] == CHAIN_SERIES]
    assert chain == [results.evaluation[n]["elbo_per_token"] for n in ("zero", "one", "two")]
    ends = [(row["iteration"], row["elbo"]) for row in elbo if row["series"] == "taught"]
    assert [iteration for iteration, _ in ends] == ["0", "2"]
    assert len({value for _, value in ends}) == 1
    curve = [row for row in tables["training curves"] if row["series"] == "two"]
    assert MAX_CURVE_LINES / 2 < len(curve) <= MAX_CURVE_LINES


def test_dvc_has_one_file_of_metrics_and_few_charts() -> None:
    """All others are plain outputs, so that `dvc exp show` has few columns."""
    stages = [stage.get("do", stage) for stage in DVC["stages"].values()]
    metrics = [path for stage in stages for path in stage.get("metrics", [])]
    assert [next(iter(entry)) for entry in metrics] == ["metrics/summary.json"]
    assert not any("plots" in stage for stage in stages)
    template = ROOT / ".dvc" / "plots" / "series.json"
    assert {plot["template"] for entry in DVC["plots"] for plot in entry.values()} == {"series"}
    assert "<DVC_METRIC_DATA>" in template.read_text("utf-8")
