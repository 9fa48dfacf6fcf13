"""The stages of an experiment as dvc.lock has them: their order, files with hashes, and params."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from boltlm.reporting.arms import ReportSettings


class LockedFile(NamedTuple):
    """A file or folder as dvc.lock has it; `size` in bytes."""

    path: str
    md5: str
    size: int


class LockedStage(NamedTuple):
    """A stage, the stages whose outputs it reads, its outputs, the files that it reads, and the
    keys of params.yaml that it depends on."""

    name: str
    parents: tuple[str, ...]
    outputs: tuple[LockedFile, ...]
    inputs: tuple[LockedFile, ...] = ()
    params: tuple[str, ...] = ()


def locked_stages(settings: ReportSettings, lock: Path) -> list[LockedStage]:
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
    outputs, inputs = (_files(stages[name].get(kind, [])) for kind in ("outs", "deps"))
    params = tuple(key for keys in stages[name].get("params", {}).values() for key in keys)
    ordered[name] = LockedStage(name, tuple(parents), outputs, inputs, params)


def _files(entries: Sequence[Mapping[str, Any]]) -> tuple[LockedFile, ...]:
    return tuple(LockedFile(e["path"], e.get("md5", ""), e.get("size", 0)) for e in entries)


def _overlaps(one: str, other: str) -> bool:
    """Whether two paths are the same, or one is inside the other."""
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")
