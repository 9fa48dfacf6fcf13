"""Where the numbers come from: stages with the hashes in dvc.lock, cost and time, versions."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from boltlm.reporting.html_config import HtmlReportSettings
from boltlm.reporting.results import Metrics, Results
from boltlm.reporting.summary import read_numbers, used_teachers

PACKAGES = ("boltlm", "torch", "transformers", "tokenizers", "lm-eval", "vllm", "dvc", "mlflow")


class LockedFile(NamedTuple):
    """An output as dvc.lock has it; `size` in bytes."""

    path: str
    md5: str
    size: int


class LockedStage(NamedTuple):
    """A stage, the stages whose outputs it reads, and its outputs."""

    name: str
    parents: tuple[str, ...]
    outputs: tuple[LockedFile, ...]


class StageCost(NamedTuple):
    """What a stage took, as texts; what was not measured is a dash."""

    stage: str
    seconds: str
    flops: str
    tokens: str
    usd: str


def locked_stages(settings: HtmlReportSettings, lock: Path) -> list[LockedStage]:
    """The stages of this experiment in dvc.lock, each after those that it reads; none where there
    is no such file. Stages that another preset left in the file are not among them."""
    if not lock.is_file():
        return []
    content: Any = yaml.safe_load(lock.read_text(encoding="utf-8"))
    stages: dict[str, Any] = content.get("stages") or {}
    makers = {out["path"]: name for name, stage in stages.items() for out in stage.get("outs", [])}
    kinds = {
        "train": settings.models,
        "latents": settings.latents,
        "evaluate": settings.models,
        "curves": settings.curves,
        "finetune": settings.finetune_runs,
    }
    wanted = ["split", *(f"{kind}@{name}" for kind, names in kinds.items() for name in names)]
    ordered: dict[str, LockedStage] = {}
    for name in (*wanted, "evaluate_base"):
        _visit(name, stages, makers, ordered)
    return list(ordered.values())


def _visit(
    name: str,
    stages: Mapping[str, Any],
    makers: Mapping[str, str],
    ordered: dict[str, LockedStage],
) -> None:
    """Append a stage to `ordered`, after those that it reads."""
    if name in ordered or name not in stages:
        return
    deps = [dep["path"] for dep in stages[name].get("deps", [])]
    parents = sorted(
        {maker for out, maker in makers.items() for dep in deps if _overlaps(out, dep)} - {name}
    )
    for parent in parents:
        _visit(parent, stages, makers, ordered)
    outs = stages[name].get("outs", [])
    files = tuple(LockedFile(o["path"], o.get("md5", ""), o.get("size", 0)) for o in outs)
    ordered[name] = LockedStage(name, tuple(parents), files)


def _overlaps(one: str, other: str) -> bool:
    """Whether two paths are the same, or one is inside the other."""
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


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
    facts = {"git commit": _git_commit(), "Python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    facts["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        facts["GPU"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return facts


def _git_commit() -> str:
    """The commit, and whether tracked files differ from it; "unknown" outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}{' with changes' if changes else ''}"


def _git(*arguments: str) -> str:
    command = ("git", *arguments)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
