"""The table over seeds holds what the files of each experiment say."""

import csv
import json
import subprocess
from pathlib import Path

import pytest

from boltlm.errors import UserError
from boltlm.reporting.seed_aggregation import (
    SEED_METRICS,
    SeedRow,
    _format_mean,
    collect_seeds,
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
    keys = [(row.model, row.k_samples, row.seed, row.metrics["elbo_per_token"]) for row in rows]
    assert keys == [
        ("em1", 4, 1, 5.0),
        ("em1", 4, 2, 6.0),
        ("em1", 8, 2, 10.0),
        ("em2", 4, 1, 105.0),
        ("em2", 4, 2, 106.0),
    ]
    assert "| em1 | 4 | 2 | 5.500 ± 0.500 | – |" in seed_table(rows)


def test_metrics_that_an_older_commit_calls_otherwise_are_blank(repository: Path) -> None:
    (repository / "metrics" / "eval").mkdir(parents=True)
    old = {"elbo_per_token": -1.5, "exact_fraction": 0.5}
    (repository / "metrics" / "eval" / "em1.json").write_text(json.dumps(old))
    add_experiment(repository, "seed: 1\nk_samples: 4\n", "old")
    write_seed_csv(repository / "seeds.csv", collect_seeds(4, []))
    with (repository / "seeds.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    blank = dict.fromkeys(SEED_METRICS, "")
    expected = {"model": "em1", "k_samples": "4", "seed": "1"}
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


def test_mean_and_standard_error() -> None:
    """s/√n with the unbiased standard deviation s."""
    assert _format_mean([1.0, 2.0, 3.0]) == "2.000 ± 0.577"
    assert _format_mean([1.0]) == "1.000"
    assert _format_mean([]) == "–"


def rows_of(bounds: dict[tuple[str, int], float], metric: str = "elbo_per_token") -> list[SeedRow]:
    return [
        SeedRow(model=model, seed=seed, k_samples=4, metrics={metric: value})
        for (model, seed), value in bounds.items()
    ]


def test_differences_are_paired_by_seed() -> None:
    """What the models of one seed have in common cancels; a seed that only one of the two models
    has is not counted."""
    bounds = {("em1", 1): 5.0, ("em1", 2): 9.0, ("em2", 1): 6.0, ("em2", 2): 10.5, ("em2", 3): 0.0}
    table = paired_table(rows_of(bounds), 4, ["em2-em1"])
    assert "| em2 − em1 | 2 | 1.250 ± 0.250 |" in table


def test_the_likelihood_of_a_raw_model_takes_the_place_of_its_bound() -> None:
    rows = rows_of({("em1", 1): -0.5}) + rows_of({("raw", 1): 0.75}, "nll_per_token")
    assert "| em1 − raw | 1 | 0.250 |" in paired_table(rows, 4, ["em1-raw"])


@pytest.mark.parametrize("pair", ["em1", "em1-em9", "em9-em1"])
def test_a_pair_of_unknown_models_is_a_user_error(pair: str) -> None:
    with pytest.raises(UserError, match=f"one of em1, em2; found '{pair}'"):
        paired_table(rows_of({("em1", 1): 1.0, ("em2", 1): 2.0}), 4, [pair])
