"""Where the numbers come from: metrics that dvc.lock knows, cost and time, versions."""

import hashlib
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from boltlm.reporting.experiment_identity import git_commit
from boltlm.reporting.html_config import HtmlReportSettings
from boltlm.reporting.lockfile import LockedStage
from boltlm.reporting.results import Metrics, Results
from boltlm.reporting.summary import read_numbers, used_teachers

PACKAGES = ("boltlm", "torch", "transformers", "tokenizers", "lm-eval", "vllm", "dvc", "mlflow")


class StageCost(NamedTuple):
    """What a stage took, as texts; what was not measured is a dash."""

    stage: str
    seconds: str
    flops: str
    tokens: str
    usd: str


def changed_metrics(stages: Sequence[LockedStage], root: Path) -> list[str]:
    """Paths of metrics files that differ from their hash in dvc.lock. `root`: the folder that paths
    in it are relative to."""
    files = [file for stage in stages for file in stage.outputs]
    return [
        file.path
        for file in files
        if file.path.startswith("metrics/") and (path := root / file.path).is_file()
        if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != file.md5
    ]


def stage_costs(settings: HtmlReportSettings, results: Results, metrics: Path) -> list[StageCost]:
    """Seconds measured on the machine that ran a stage, FLOPs, tokens and money, for each stage
    that has one of them. Tokens are those trained on or run through the model."""
    costs = [_teacher_cost(name, metrics) for name in used_teachers(settings)]
    for name, totals in results.training.items():
        stage = f"train@{name}" if name in settings.models else name
        curve = results.curves.get(name, [])
        tokens = totals.get("training_tokens", curve[-1].get("tokens") if curve else None)
        seconds = _seconds(results.timings.get(name, []))
        costs.append(_cost(stage, seconds, totals.get("training_flops"), tokens))
    for name, totals in results.diagnostics.items():
        seconds = _seconds(results.timings.get(f"latents/{name}", []))
        flops, tokens = totals.get("estep_flops"), totals.get("forward_tokens")
        costs.append(_cost(f"latents@{name}", seconds, flops, tokens))
    return costs


def _teacher_cost(name: str, metrics: Path) -> StageCost:
    numbers = read_numbers(metrics / "teacher" / f"{name}.json")
    return _cost(
        f"teacher@{name}", None, None, numbers.get("latent_tokens"), numbers.get("cost_usd")
    )


def _seconds(lines: Sequence[Metrics]) -> float | None:
    """The time of a training up to its last line, or of an E-step."""
    return lines[-1].get("seconds") if lines else None


def _cost(
    stage: str,
    seconds: float | None,
    flops: float | None,
    tokens: float | None,
    usd: float | None = None,
) -> StageCost:
    formats = ((seconds, ",.1f"), (flops, ".2e"), (tokens, ",.0f"), (usd, ",.2f"))
    return StageCost(stage, *("–" if v is None else format(v, spec) for v, spec in formats))


def versions() -> dict[str, str]:
    """Software and hardware of the machine that writes the report."""
    facts = {"git commit": git_commit(), "Python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    facts["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        facts["GPU"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return facts
