"""The table over seeds holds what the experiments' own files say."""

import json
import subprocess
from pathlib import Path

import pytest

from boltlm.figures.seeds import mean, rows, steps, table


def git(folder: Path, *arguments: str) -> str:
    command = ("git", "-c", "user.name=t", "-c", "user.email=t@localhost", *arguments)
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_experiments_are_told_apart_by_their_params(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed and K are read from each experiment; of another K only the models it made anew count."""
    git(tmp_path, "init", "-q")
    (tmp_path / "metrics" / "eval").mkdir(parents=True)
    for seed, draws in ((1, 4), (2, 4), (2, 8)):
        (tmp_path / "params.yaml").write_text(f"seed: {seed}\nk_samples: {draws}\n")
        for model, offset in (("em1", 0.0), ("em2", 100.0)):
            facts = {"elbo_per_token": seed + draws + offset, "nll_per_token": None}
            (tmp_path / "metrics" / "eval" / f"{model}.json").write_text(json.dumps(facts))
        git(tmp_path, "add", "-A")
        git(tmp_path, "commit", "-qm", "x")
        git(tmp_path, "update-ref", f"refs/exps/aa/bb/run{seed}-{draws}", "HEAD")
    monkeypatch.chdir(tmp_path)
    found = rows(4, ["em1"])
    assert [(r["model"], r["k_samples"], r["seed"], r["elbo_per_token"]) for r in found] == [
        ("em1", 4, 1, 5.0),
        ("em1", 4, 2, 6.0),
        ("em1", 8, 2, 10.0),
        ("em2", 4, 1, 105.0),
        ("em2", 4, 2, 106.0),
    ]
    assert "| em1 | 4 | 2 | 5.500 ± 0.500 | – |" in table(found)


def test_mean_and_standard_error() -> None:
    """s/√n with the unbiased s, as the text beside the table says."""
    assert mean([1.0, 2.0, 3.0]) == "2.000 ± 0.577"
    assert mean([1.0, None]) == "1.000"
    assert mean([None]) == "–"


def test_differences_are_paired_by_seed() -> None:
    """What differs between seeds falls out; a seed that only one of both has does not count."""
    bounds = {("em1", 1): 5.0, ("em1", 2): 9.0, ("em2", 1): 6.0, ("em2", 2): 10.5, ("em2", 3): 0.0}
    found = [
        {"model": model, "seed": seed, "k_samples": 4, "elbo_per_token": value}
        for (model, seed), value in bounds.items()
    ]
    assert "| em2 − em1 | 2 | 1.250 ± 0.250 |" in steps(found, 4, ["em2-em1"])
