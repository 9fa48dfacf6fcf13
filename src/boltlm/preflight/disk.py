"""Which stages are done, and the room on the disk that the others need."""

import shutil
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import yaml

from boltlm.param_values import Finding
from boltlm.params import build_settings
from boltlm.reporting.plan import WEIGHT_BYTES, Planner
from boltlm.reporting.plan_config import ACCELERATORS, PlanSettings
from boltlm.reporting.plan_table import short_size

# A training keeps two checkpoints and writes a third before it removes one; each has the weights
# and, with AdamW, two moments of each.
CHECKPOINTS, STATES = 3, 3


def disk_findings(params: Mapping[str, Any], folder: Path) -> Iterator[Finding]:
    """Too little room on the disk of `folder`, which holds the experiment with its dvc.lock. Params
    must be right."""
    needed = needed_bytes(params, done_stages(params, folder / "dvc.lock"))
    free = shutil.disk_usage(folder).free
    if needed > free:
        yield Finding(
            "",
            f"the stages that have not run need about {short_size(needed)} of disk (`boltlm plan`"
            f" and the checkpoints of a training), but {short_size(free)} are free in"
            f" {folder.resolve()}; make room there",
        )


def done_stages(params: Mapping[str, Any], lock: Path) -> frozenset[str]:
    """The stages that a dvc.lock has with these very params, and whose outputs exist."""
    if not lock.is_file():
        return frozenset()
    stages: dict[str, Any] = yaml.load(lock.read_bytes(), yaml.CSafeLoader).get("stages") or {}
    return frozenset(
        name
        for name, stage in stages.items()
        if all((lock.parent / out["path"]).exists() for out in stage.get("outs", []))
        if all(
            _value(params, key) == value
            for key, value in stage.get("params", {}).get("params.yaml", {}).items()
        )
    )


def needed_bytes(params: Mapping[str, Any], done: Set[str]) -> int:
    """Room for the outputs of the stages that are not done, each once, and for the checkpoints of
    one training, as far as sizes are known. Raises UserError where params are wrong."""
    settings = build_settings(PlanSettings, params)
    stages = Planner(settings, ACCELERATORS["cpu"], 1).stages()
    waiting = [stage for stage in stages if stage.stage not in done]
    is_training = any(stage.steps for stage in waiting)
    size = settings.model_size.parameters * WEIGHT_BYTES if settings.model_size else 0
    outputs = sum(stage.disk_bytes or 0 for stage in waiting)
    return outputs + (CHECKPOINTS * STATES * size if is_training else 0)


def _value(params: Mapping[str, Any], key: str) -> Any:
    value: Any = params
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
