"""Means over seeds hold what the files of each experiment say, and of nothing else than seeds."""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from boltlm.errors import UserError
from boltlm.params import build_settings, load
from boltlm.reporting.seed_aggregation import (
    SeedGroup,
    mean_over_seeds,
    paired_table,
    parse_pairs,
    seed_groups,
    seed_table,
)
from boltlm.reporting.seed_rows import SeedRow, Seeds, collect_rows
from boltlm.reporting.seed_tables import (
    SeedsSettings,
    aggregate_experiment,
    read_lines,
    read_seed_rows,
    write_means,
    write_seed_rows,
)
from tests.tiny import ROOT

ALL = ("*",)
MODELS = {
    "warmstart": {"parent": "base", "data": "teacher/warmstart"},
    "em1": {"parent": "base", "data": "latents/em1"},
    "em2": {"parent": "base", "data": "latents/em2"},
}
PARAMS: dict[str, Any] = {
    "data_seed": 1,
    "seed": 1,
    "k_samples": 4,
    "models": MODELS,
    "latents": {"em1": {"model": "warmstart"}, "em2": {"model": "em1"}},
}


def md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def write_experiment(
    folder: Path, params: dict[str, Any], metrics: Mapping[str, Mapping[str, Any]]
) -> None:
    """params.yaml, the metrics of each model, and a dvc.lock as DVC writes it after all stages have
    run: data ← split, models/<name> ← its data, evaluate@<name> ← models/<name>."""
    (folder / "metrics" / "eval").mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))

    def stage(keys: tuple[str, ...], deps: list[str], out: str, content: str) -> dict[str, Any]:
        values = {key: value_at(params, key) for key in keys}
        return {
            "params": {"params.yaml": values},
            "deps": [{"path": path, "md5": content_of[path]} for path in deps],
            "outs": [{"path": out, "md5": content_of.setdefault(out, md5(content))}],
        }

    content_of: dict[str, str] = {}
    stages = {"split": stage(("data_seed",), [], "data/split", f"split {params['data_seed']}")}
    for name, entry in params.get("models", {}).items():
        deps, source = ["data/split"], entry["data"].partition("/")[2]
        if entry["data"].startswith("latents/"):
            model = f"models/{params['latents'][source]['model']}"
            out, drawn = f"data/latents/{source}", f"{source} {params['k_samples']}"
            if f"latents@{source}" not in stages:
                keys = ("seed", "k_samples", f"latents.{source}")
                drawn += content_of[model]
                stages[f"latents@{source}"] = stage(keys, [model], out, drawn)
            deps.append(out)
        text = f"{name} {params['seed']} {entry} {[content_of[d] for d in deps]}"
        stages[f"train@{name}"] = stage(("seed", f"models.{name}"), deps, f"models/{name}", text)
    for name, values in metrics.items():
        text = json.dumps(values)
        (folder / "metrics" / "eval" / f"{name}.json").write_text(text)
        out = f"metrics/eval/{name}.json"
        stages[f"evaluate@{name}"] = stage(("seed",), [f"models/{name}"], out, text)
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def value_at(params: Any, key: str) -> Any:
    for part in key.split("."):
        params = params[part]
    return params


def git(folder: Path, *arguments: str) -> str:
    command = ("git", "-c", "user.name=t", "-c", "user.email=t@localhost", *arguments)
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def add_experiment(folder: Path, name: str) -> None:
    """Commit what is in `folder` as a DVC experiment."""
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "x")
    git(folder, "update-ref", f"refs/exps/aa/bb/{name}", "HEAD")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty git repository, which is the working directory."""
    git(tmp_path, "init", "-q")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keys_of(rows: list[SeedRow]) -> list[tuple[Any, ...]]:
    return [(row.group, row.model, *row.seeds) for row in rows]


def test_experiments_that_differ_by_seed_only_are_one_group(repository: Path) -> None:
    """Another K is another group, of the models that depend on it; the warm start does not, and is
    the same row in both. Any metric is taken, and no standard error."""
    for seed, k_samples in ((1, 4), (2, 4), (2, 8)):
        metrics = {"odd_metric": float(seed), "odd_metric_se": 0.5, "missing": None}
        changed = metrics | {"odd_metric": float(seed + k_samples)}
        params = PARAMS | {"seed": seed, "k_samples": k_samples}
        write_experiment(repository, params, {"warmstart": metrics, "em1": changed})
        add_experiment(repository, f"run{seed}-{k_samples}")
    rows, left_out = collect_rows(PARAMS, ["odd*"])
    assert left_out == []
    assert keys_of(rows) == [
        ("", "em1", 1, 1, 1),
        ("", "em1", 1, 2, 2),
        ("", "warmstart", 1, 1, 1),
        ("", "warmstart", 1, 2, 2),
        ("k_samples=8", "em1", 1, 2, 2),
    ]
    assert [dict(row.metrics) for row in rows[:2]] == [{"odd_metric": 5.0}, {"odd_metric": 6.0}]
    assert "| em1 | 2 seeds | 5.5 ± 6.4 |" in seed_table(seed_groups("x", rows))


def test_metrics_that_a_partial_run_left_behind_are_left_out(repository: Path) -> None:
    """`dvc exp run -S k_samples=8 evaluate@em1` trains em1 anew and leaves the metrics of em2,
    which was made from the old one. They are not those of K = 8."""
    both = {"em1": {"a": 1.0}, "em2": {"a": 2.0}}
    write_experiment(repository, PARAMS, both)
    before = yaml.safe_load((repository / "dvc.lock").read_text())["stages"]
    write_experiment(repository, PARAMS | {"k_samples": 8}, both | {"em1": {"a": 3.0}})
    lock = yaml.safe_load((repository / "dvc.lock").read_text())
    for stage in ("latents@em2", "train@em2", "evaluate@em2"):
        lock["stages"][stage] = before[stage]
    (repository / "dvc.lock").write_text(yaml.safe_dump(lock))
    add_experiment(repository, "partial")
    rows, left_out = collect_rows(PARAMS, ALL)
    assert keys_of(rows) == [("k_samples=8", "em1", 1, 1, 1)]
    (reason,) = left_out
    assert reason.startswith("partial: metrics/eval/em2.json: latents@em2 was made ")
    (repository / "metrics/eval/em1.json").write_text('{"a": 4.0}')
    add_experiment(repository, "edited")
    assert any(
        "edited: metrics/eval/em1.json: not the file" in r for r in collect_rows(PARAMS, ALL)[1]
    )


def test_copies_of_the_repository_are_read_like_experiments(tmp_path: Path) -> None:
    folders = [tmp_path / f"run{seed}" for seed in (1, 2)]
    for seed, folder in enumerate(folders, 1):
        params = PARAMS | {"seed": seed, "data_seed": seed}
        write_experiment(folder, params, {"em1": {"elbo_per_token": -float(seed)}})
    rows, _ = collect_rows(PARAMS, ALL, folders)
    assert keys_of(rows) == [("", "em1", 1, 1, 1), ("", "em1", 2, 2, 2)]
    assert [*rows[0].metrics.values(), *rows[1].metrics.values()] == [-1.0, -2.0]
    write_experiment(folders[1], PARAMS, {"em1": {"elbo_per_token": -2.0}})
    with pytest.raises(UserError, match=r"run2: another experiment has other metrics of em1"):
        collect_rows(PARAMS, ALL, folders)
    (folders[1] / "dvc.lock").unlink()
    with pytest.raises(UserError, match=r"run2: no params\.yaml or no dvc\.lock"):
        collect_rows(PARAMS, ALL, folders)


def test_trainings_over_the_same_data_are_told_from_replicates(tmp_path: Path) -> None:
    """Two replicates, each with three trainings of em1 (the entries differ by their seed alone)
    over the same data: the mean over the replicates has the entry without a seed of its own."""
    em1 = MODELS["em1"]
    models = {
        "warmstart": MODELS["warmstart"],
        "em1": em1,
        "em1_seed8": {**em1, "seed": 8},
        "em1_seed9": {**em1, "seed": 9},
        "em2": MODELS["em2"],
    }
    for seed in (1, 2):
        params = PARAMS | {"seed": seed, "data_seed": seed, "models": models}
        names = ("em1", "em1_seed8", "em1_seed9", "em2")
        values = {n: {"elbo_per_token": -float(10 * seed + i)} for i, n in enumerate(names)}
        write_experiment(tmp_path / f"run{seed}", params, values)
    params = PARAMS | {"models": models}
    rows, _ = collect_rows(params, ALL, [tmp_path / "run1", tmp_path / "run2"])
    assert {tuple(row.seeds) for row in rows if row.model == "em1"} == {
        (seed, seed, own) for seed in (1, 2) for own in (seed, 8, 9)
    }
    groups = seed_groups("x", rows)
    lines = [line.split(" | ")[:3] for line in seed_table(groups).splitlines()[2:]]
    assert lines == [
        ["| em1", "2 replicates", "−15 ± 64 |"],
        ["| em1", "3 trainings", "−11.0 ± 2.5 |"],
        ["| em1", "3 trainings", "−21.0 ± 2.5 |"],
        ["| em2", "2 replicates", "−18 ± 64 |"],
    ]
    assert paired_table(groups, [("em1", "em2")]).splitlines()[2:] == [
        "| em1 − em2 | 2 replicates | 3.000 ± 0 |",
        "| em1 − em2 | 3 trainings | 2.0 ± 2.5 |",
        "| em1 − em2 | 3 trainings | 2.0 ± 2.5 |",
    ]


def test_a_model_that_builds_on_another_training_is_another_group(tmp_path: Path) -> None:
    """Two experiments in which em1 has seeds of its own: its latents, and so em2, are others than
    em2's in an experiment of these seeds. What both have alike, the warm start, is one row."""
    folders = [tmp_path / "2", tmp_path / "3"]
    for seed, folder in zip((2, 3), folders, strict=True):
        params = PARAMS | {"models": MODELS | {"em1": {**MODELS["em1"], "seed": seed}}}
        values = {"warmstart": -3.0, "em1": -float(seed), "em2": -0.1 * seed}
        write_experiment(folder, params, {n: {"elbo_per_token": v} for n, v in values.items()})
    rows, _ = collect_rows(PARAMS, ALL, folders)
    assert keys_of(rows) == [
        ("", "em1", 1, 1, 2),
        ("", "em1", 1, 1, 3),
        ("", "warmstart", 1, 1, 1),
        ("models.em1.seed=2", "em2", 1, 1, 1),
        ("models.em1.seed=3", "em2", 1, 1, 1),
    ]
    table = paired_table(seed_groups("x", rows), [("em1", "warmstart")])
    assert table.splitlines()[2:] == ["| em1 − warmstart | 2 trainings | 0.5 ± 6.4 |"]


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [
        SeedRow(group="k_samples=8, a=b", model="em1", seeds=Seeds(1, 2, 3), metrics={"x": 0.1}),
        SeedRow(group="", model="em2", seeds=Seeds(1, 2, 2), metrics={"y/z": -2.5}),
    ]
    write_seed_rows(tmp_path / "rows.csv", rows)
    assert read_seed_rows(tmp_path / "rows.csv") == rows
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no column data_seed, group, model, seed, train_seed"):
        read_seed_rows(tmp_path / "other.csv")


def test_the_tables_in_git_can_be_read() -> None:
    counts = {
        path.stem: len(read_seed_rows(path)) for path in (ROOT / "metrics/collected").glob("*.csv")
    }
    assert counts == {
        "seeds": 70,
        "trainings": 15,
        "estimators": 150,
        "context_loss": 30,
        "layout_document": 16,
    }


def test_the_stage_aggregates_this_experiment_and_what_was_collected(tmp_path: Path) -> None:
    """Trainings in the experiment's own graph are a mean; so are collected rows. What contradicts
    this experiment with the same seeds, and what is not there yet, is said."""
    params = load(ROOT / "params.yaml")
    params["models"]["em1_seed2"] = {**params["models"]["em1"], "seed": 2}
    params["seeds"] |= {"collected": ["some", "later"], "metrics": ["elbo*"]}
    metrics = tmp_path / "metrics"
    (metrics / "eval").mkdir(parents=True)
    for name, value in (("em1", -1.0), ("em1_seed2", -3.0), ("warmstart", -4.0)):
        text = json.dumps({"elbo_per_token": value, "other": 1})
        (metrics / "eval" / f"{name}.json").write_text(text)
    rows = rows_of({("em1", 1): -1.5, ("em1", 2): -1.25, ("warmstart", 1): -4.0})
    (tmp_path / "collected").mkdir()
    write_seed_rows(tmp_path / "collected" / "some.csv", rows)
    settings = build_settings(SeedsSettings, params)
    aggregate_experiment(settings, metrics, tmp_path / "collected", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "`later.csv` is not there yet" in text
    assert "**`some.csv` has other values of em1 than this experiment" in text
    assert "| em1 | 2 trainings | −2 ± 13 |" in text
    assert "| em1 − warmstart | 2 trainings | 2 ± 13 |" in text
    means = read_lines(tmp_path / "out" / "means.csv")
    lines = {(line["source"], line["model"]): line for line in means}
    own = lines["experiment", "em1"]
    assert {key: own[key] for key in ("metric", "unit", "better", "over", "seeds", "n")} == {
        "metric": "elbo_per_token",
        "unit": "nats per token",
        "better": "higher",
        "over": "trainings",
        "seeds": "1 2",
        "n": "2",
    }
    assert (float(own["mean"]), float(own["se"])) == (-2.0, pytest.approx(1.0))
    assert float(own["high"]) == pytest.approx(-2 + 12.706, rel=1e-4)
    assert (own["baseline"], own["pairs"], own["difference"]) == ("warmstart", "2", "2.0")
    assert own["values"] == "-1.0 -3.0"
    assert lines["some", "em1"]["mean"] == "-1.375"


def test_a_single_run_of_another_k_is_a_line_without_an_error(tmp_path: Path) -> None:
    row = SeedRow(group="k_samples=8", model="em1", seeds=Seeds(1, 1, 1), metrics={"x": 2.0})
    write_means(tmp_path / "means.csv", seed_groups("some", [row]), None)
    (line,) = read_lines(tmp_path / "means.csv")
    assert (line["n"], line["mean"], line["se"], line["low"]) == ("1", "2.0", "", "")


def test_a_repository_without_experiments_is_a_user_error(repository: Path) -> None:
    with pytest.raises(UserError, match="no finished DVC experiments"):
        collect_rows(PARAMS, ALL)
    git(repository, "commit", "-qm", "x", "--allow-empty")
    git(repository, "update-ref", "refs/exps/stash", "HEAD")  # an entry of DVC's queue
    with pytest.raises(UserError, match="no finished DVC experiments"):
        collect_rows(PARAMS, ALL)


def test_an_experiment_without_a_seed_is_refused_by_name(repository: Path) -> None:
    write_experiment(repository, PARAMS | {"seed": "x"}, {"em1": {"a": 1.0}})
    add_experiment(repository, "unseeded")
    with pytest.raises(UserError, match=r"seed = 'x'.*dvc exp remove unseeded"):
        collect_rows(PARAMS, ALL)


def test_a_failure_of_git_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError, match="git for-each-ref"):
        collect_rows(PARAMS, ALL)


def rows_of(bounds: dict[tuple[str, int], float], metric: str = "elbo_per_token") -> list[SeedRow]:
    return [
        SeedRow(group="", model=model, seeds=Seeds(seed, seed, seed), metrics={metric: value})
        for (model, seed), value in bounds.items()
    ]


def groups_of(rows: list[SeedRow]) -> list[SeedGroup]:
    return seed_groups("x", rows)


def test_mean_and_interval() -> None:
    """s/√n with the unbiased standard deviation s, times the 97.5 % quantile of the t distribution
    with n − 1 degrees of freedom, here from a table: 4.303 for n = 3 and 2.262 for n = 10."""
    assert mean_over_seeds([1.0, 2.0, 3.0]) == pytest.approx(
        (2, 3**-0.5, 4.303 * 3**-0.5), rel=1e-3
    )
    mean, error, half_width = mean_over_seeds([float(value) for value in range(10)])
    assert (mean, half_width / error) == (4.5, pytest.approx(2.262, rel=1e-3))


def test_a_mean_has_as_many_decimals_as_its_interval_says() -> None:
    """Two significant digits of the half-width; a cell with fewer seeds than its row says so."""
    rows = rows_of({("a", 1): 0.5, ("a", 2): 0.5001, ("a", 3): 0.5002})
    assert "| a | 3 replicates | 0.5001 ± 0.0002 |" in seed_table(seed_groups("x", rows))
    rows[0] = SeedRow(group="", model="a", seeds=Seeds(1, 1, 1), metrics={"other": 1.0})
    table = seed_table(seed_groups("x", rows))
    assert "| a | 3 replicates | 0.5001 ± 0.0006 (n = 2) | 1.000 (n = 1) |" in table


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Over 4000 experiments of five normal seeds, 95 % of the intervals contain the true mean, with
    a standard error of 0.34 %; two standard errors would be 88 %."""
    draws = np.random.default_rng(2).normal(1.0, 2.0, size=(4000, 5))
    intervals = [mean_over_seeds(seeds) for seeds in draws.tolist()]
    assert abs(np.mean([abs(i.mean - 1) < i.half_width for i in intervals]) - 0.95) < 0.014
    assert np.mean([abs(i.mean - 1) < 2 * i.standard_error for i in intervals]) < 0.9


def test_differences_are_paired_by_seed() -> None:
    """What the models of one seed have in common cancels; a seed that only one of the two models
    has is not counted. The half-width is 12.706, t of one degree of freedom, times 0.25."""
    bounds = {("em1", 1): 5.0, ("em1", 2): 9.0, ("em2", 1): 6.0, ("em2", 2): 10.5, ("em2", 3): 0.0}
    table = paired_table(groups_of(rows_of(bounds)), [("em2", "em1")])
    assert "| em2 − em1 | 3 replicates | 1.2 ± 3.2 (n = 2) |" in table


def test_the_likelihood_of_a_raw_model_takes_the_place_of_its_bound() -> None:
    rows = rows_of({("em1", 1): -0.5}) + rows_of({("raw", 1): 0.75}, "nll_in_context_per_token")
    assert "| em1 − raw | 1 | 0.250 |" in paired_table(groups_of(rows), [("em1", "raw")])


@pytest.mark.parametrize("pair", ["em1", "em1-em9", "em9-em1"])
def test_a_pair_of_unknown_models_is_a_user_error(pair: str) -> None:
    with pytest.raises(UserError, match=f"one of em1, em2; found '{pair}'"):
        parse_pairs(groups_of(rows_of({("em1", 1): 1.0, ("em2", 1): 2.0})), [pair])
