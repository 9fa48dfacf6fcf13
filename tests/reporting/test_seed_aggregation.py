"""The table over seeds holds what the files of each experiment say."""

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boltlm.errors import UserError
from boltlm.reporting.seed_aggregation import (
    SEED_METRICS,
    SeedRow,
    Seeds,
    _format_mean,
    collect_seeds,
    mean_over_seeds,
    paired_table,
    seed_table,
    write_seed_csv,
)


def git(folder: Path, *arguments: str) -> str:
    command = ("git", "-c", "user.name=t", "-c", "user.email=t@localhost", *arguments)
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def add_experiment(folder: Path, params: str, name: str) -> None:
    """Commit the metrics in `folder` as a DVC experiment with these params."""
    (folder / "params.yaml").write_text(params)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "x")
    git(folder, "update-ref", f"refs/exps/aa/bb/{name}", "HEAD")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty git repository, which is the working directory."""
    git(tmp_path, "init", "-q")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_experiments_are_identified_by_their_params(repository: Path) -> None:
    """Seed and K come from each experiment's params.yaml; with another K, only the models that were
    asked for are taken."""
    (repository / "metrics" / "eval").mkdir(parents=True)
    for seed, k_samples in ((1, 4), (2, 4), (2, 8)):
        for model, offset in (("em1", 0.0), ("em2", 100.0)):
            metrics = {"elbo_per_token": seed + k_samples + offset, "nll_per_token": None}
            path = repository / "metrics" / "eval" / f"{model}.json"
            path.write_text(json.dumps(metrics))
        params = f"seed: {seed}\nk_samples: {k_samples}\n"
        add_experiment(repository, params, f"run{seed}-{k_samples}")
    rows = collect_seeds(4, ["em1"])
    keys = [(row.model, row.k_samples, row.seeds.seed, *row.metrics.values()) for row in rows]
    assert keys == [
        ("em1", 4, 1, 5.0),
        ("em1", 4, 2, 6.0),
        ("em1", 8, 2, 10.0),
        ("em2", 4, 1, 105.0),
        ("em2", 4, 2, 106.0),
    ]
    assert "| em1 | 4 | 2 replicates | 5.500 ± 6.353 | – |" in seed_table(rows)


def test_copies_of_the_repository_are_read_like_experiments(tmp_path: Path) -> None:
    folders = [tmp_path / f"run{seed}" for seed in (1, 2)]
    for seed, folder in enumerate(folders, 1):
        (folder / "metrics" / "eval").mkdir(parents=True)
        (folder / "params.yaml").write_text(f"seed: {seed}\nk_samples: 4\n")
        (folder / "metrics" / "eval" / "em1.json").write_text(
            json.dumps({"elbo_per_token": -float(seed)})
        )
    rows = collect_seeds(4, [], folders)
    assert [(row.seeds.seed, *row.metrics.values()) for row in rows] == [
        (1, -1.0),
        (2, -2.0),
    ]
    (folders[1] / "params.yaml").unlink()
    with pytest.raises(UserError, match=r"run2: no params\.yaml"):
        collect_seeds(4, [], folders)


def test_trainings_over_the_same_data_are_told_from_replicates(tmp_path: Path) -> None:
    """Two replicates, each with three trainings of em1 (the entries differ by their seed alone)
    over the same data: the mean over the replicates has the entry without a seed of its own. A
    model with other data is a model of its own."""
    entry = {"parent": "base", "data": "latents/em1"}
    models = {
        "em1": entry,
        "em1_seed8": {**entry, "seed": 8},
        "em1_seed9": {**entry, "seed": 9},
        "em2": {**entry, "data": "latents/em2"},
    }
    for seed in (1, 2):
        folder = tmp_path / f"run{seed}"
        (folder / "metrics" / "eval").mkdir(parents=True)
        params = {"data_seed": seed, "seed": seed, "k_samples": 4, "models": models}
        (folder / "params.yaml").write_text(json.dumps(params))
        for number, name in enumerate(models):
            metrics = json.dumps({"elbo_per_token": -float(10 * seed + number)})
            (folder / "metrics" / "eval" / f"{name}.json").write_text(metrics)
    rows = collect_seeds(4, [], [tmp_path / "run1", tmp_path / "run2"])
    assert {tuple(row.seeds) for row in rows if row.model == "em1"} == {
        (seed, seed, own) for seed in (1, 2) for own in (seed, 8, 9)
    }
    lines = [line.split(" | ")[:4] for line in seed_table(rows).splitlines()[2:]]
    assert lines == [
        ["| em1", "4", "2 replicates", "-15.000 ± 63.531"],
        ["| em1", "4", "3 trainings", "-11.000 ± 2.484"],
        ["| em1", "4", "3 trainings", "-21.000 ± 2.484"],
        ["| em2", "4", "2 replicates", "-18.000 ± 63.531"],
    ]
    assert paired_table(rows, 4, ["em1-em2"]).splitlines()[2:] == [
        "| em1 − em2 | 2 replicates | 3.000 ± 0.000 |",
        "| em1 − em2 | 3 trainings | 2.000 ± 2.484 |",
        "| em1 − em2 | 3 trainings | 2.000 ± 2.484 |",
    ]


def test_a_model_that_builds_on_another_training_is_left_out(tmp_path: Path) -> None:
    """Two experiments in which em1 has seeds of its own: its latents, and so em2, are others than
    em2's in an experiment of these seeds. What both have alike, the warm start, is one row."""
    models: dict[str, dict[str, Any]] = {
        "warmstart": {"parent": "base", "data": "teacher/warmstart"},
        "em1": {"parent": "base", "data": "latents/em1"},
        "em2": {"parent": "base", "data": "latents/em2"},
    }
    latents = {"em1": {"model": "warmstart"}, "em2": {"model": "em1"}}
    for seed in (2, 3):
        folder = tmp_path / str(seed)
        (folder / "metrics" / "eval").mkdir(parents=True)
        models["em1"]["seed"] = seed
        params = {"data_seed": 1, "seed": 1, "k_samples": 4, "models": models, "latents": latents}
        (folder / "params.yaml").write_text(json.dumps(params))
        for name, value in (("warmstart", -3.0), ("em1", -float(seed)), ("em2", -0.1 * seed)):
            metrics = json.dumps({"elbo_per_token": value})
            (folder / "metrics" / "eval" / f"{name}.json").write_text(metrics)
    folders = [tmp_path / "2", tmp_path / "3"]
    rows = collect_seeds(4, [], folders)
    assert [(row.model, row.seeds.train_seed) for row in rows] == [
        ("em1", 2),
        ("em1", 3),
        ("warmstart", 1),
    ]
    table = paired_table(rows, 4, ["em1-warmstart"])
    assert table.splitlines()[2:] == ["| em1 − warmstart | 2 trainings | 0.500 ± 6.353 |"]
    (folders[1] / "metrics" / "eval" / "warmstart.json").write_text('{"elbo_per_token": -4.0}')
    with pytest.raises(UserError, match=r"3: another folder has other metrics of warmstart"):
        collect_seeds(4, [], folders)


def test_metrics_that_an_older_commit_calls_otherwise_are_blank(repository: Path) -> None:
    (repository / "metrics" / "eval").mkdir(parents=True)
    old = {"elbo_per_token": -1.5, "exact_fraction": 0.5}
    (repository / "metrics" / "eval" / "em1.json").write_text(json.dumps(old))
    add_experiment(repository, "seed: 1\nk_samples: 4\n", "old")
    write_seed_csv(repository / "seeds.csv", collect_seeds(4, []))
    with (repository / "seeds.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    blank = dict.fromkeys(SEED_METRICS, "")
    seeds = dict.fromkeys(Seeds._fields, "1")
    expected = {"model": "em1", "k_samples": "4", **seeds}
    assert row == expected | blank | {"elbo_per_token": "-1.5"}


def test_a_repository_without_experiments_is_a_user_error(repository: Path) -> None:
    with pytest.raises(UserError, match="no finished DVC experiments"):
        collect_seeds(4, [])
    git(repository, "commit", "-qm", "x", "--allow-empty")
    git(repository, "update-ref", "refs/exps/stash", "HEAD")  # an entry of DVC's queue
    with pytest.raises(UserError, match="no finished DVC experiments"):
        collect_seeds(4, [])


def test_an_experiment_without_a_seed_is_refused_by_name(repository: Path) -> None:
    add_experiment(repository, "k_samples: 4\n", "unseeded")
    with pytest.raises(UserError, match=r"seed = None.*dvc exp remove unseeded"):
        collect_seeds(4, [])


def test_a_failure_of_git_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError, match="git for-each-ref"):
        collect_seeds(4, [])


def test_mean_and_interval() -> None:
    """s/√n with the unbiased standard deviation s, times the 97.5 % quantile of the t distribution
    with n − 1 degrees of freedom, here from a table: 4.303 for n = 3 and 2.262 for n = 10."""
    assert mean_over_seeds([1.0, 2.0, 3.0]) == pytest.approx(
        (2, 3**-0.5, 4.303 * 3**-0.5), rel=1e-3
    )
    mean, error, half_width = mean_over_seeds([float(value) for value in range(10)])
    assert (mean, half_width / error) == (4.5, pytest.approx(2.262, rel=1e-3))
    assert _format_mean([1.0, 2.0, 3.0]) == "2.000 ± 2.484"
    assert _format_mean([1.0]) == "1.000"
    assert _format_mean([]) == "–"


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Over 4000 experiments of five normal seeds, 95 % of the intervals contain the true mean, with
    a standard error of 0.34 %; two standard errors would be 88 %."""
    draws = np.random.default_rng(2).normal(1.0, 2.0, size=(4000, 5))
    intervals = [mean_over_seeds(seeds) for seeds in draws.tolist()]
    assert abs(np.mean([abs(i.mean - 1) < i.half_width for i in intervals]) - 0.95) < 0.014
    assert np.mean([abs(i.mean - 1) < 2 * i.standard_error for i in intervals]) < 0.9


def rows_of(bounds: dict[tuple[str, int], float], metric: str = "elbo_per_token") -> list[SeedRow]:
    return [
        SeedRow(model=model, seeds=Seeds(seed, seed, seed), k_samples=4, metrics={metric: value})
        for (model, seed), value in bounds.items()
    ]


def test_differences_are_paired_by_seed() -> None:
    """What the models of one seed have in common cancels; a seed that only one of the two models
    has is not counted. The half-width is 12.706, t of one degree of freedom, times 0.25."""
    bounds = {("em1", 1): 5.0, ("em1", 2): 9.0, ("em2", 1): 6.0, ("em2", 2): 10.5, ("em2", 3): 0.0}
    table = paired_table(rows_of(bounds), 4, ["em2-em1"])
    assert "| em2 − em1 | 2 replicates | 1.250 ± 3.177 |" in table


def test_the_likelihood_of_a_raw_model_takes_the_place_of_its_bound() -> None:
    rows = rows_of({("em1", 1): -0.5}) + rows_of({("raw", 1): 0.75}, "nll_in_context_per_token")
    assert "| em1 − raw | 1 | 0.250 |" in paired_table(rows, 4, ["em1-raw"])


@pytest.mark.parametrize("pair", ["em1", "em1-em9", "em9-em1"])
def test_a_pair_of_unknown_models_is_a_user_error(pair: str) -> None:
    with pytest.raises(UserError, match=f"one of em1, em2; found '{pair}'"):
        paired_table(rows_of({("em1", 1): 1.0, ("em2", 1): 2.0}), 4, [pair])
