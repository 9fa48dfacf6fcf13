"""What MLflow is told of an experiment: which params, tags, data sets and times belong to its run
and to the run of each part (docs/reporting.md).
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from boltlm.params import flatten_params
from boltlm.reporting.arms import ReportSettings
from boltlm.reporting.experiment_identity import FACTS_FILE, Preset, git_commit
from boltlm.reporting.headline import headline_points
from boltlm.reporting.lockfile import LockedStage, locked_stages
from boltlm.reporting.mlflow_tracking import DataSet, ExperimentRecord, RunRecord
from boltlm.reporting.results import read_results, run_points
from boltlm.timing import timing_path

MAX_CHANGE_TAGS = 20
_ENTRY_SECTIONS = ("models.", "latents.", "curves.", "finetune.runs.")  # params of the parts
_UNTRACKED = ("src/", "stages/", "metrics/", "models/", "snapshots/")  # no data sets


@dataclass(frozen=True, slots=True)
class TrackedFiles:
    """What is read: params.yaml, the folder of metrics and that of figures in it, the wall-clock
    figures, dvc.lock, and the page of this experiment, which may be missing."""

    params: Path
    metrics: Path
    figures: Path
    timings: Path
    lock: Path
    page: Path


def experiment_record(
    settings: ReportSettings, flat: Mapping[str, str], preset: Preset, files: TrackedFiles
) -> ExperimentRecord:
    """The record of the experiment in these files. `flat`: all its params as dotted keys."""
    results = read_results(settings, files.metrics, files.timings)
    stages = locked_stages(settings, files.lock)
    facts_path = files.page.with_name(FACTS_FILE)
    facts = json.loads(facts_path.read_text("utf-8")) if facts_path.is_file() else {}
    parts = {
        part: RunRecord(
            params=_part_params(settings, flat, part),
            points=points,
            inputs=_part_inputs(stages, part),
            **_part_times(files.timings, part, results.timings.get(part, [])),
        )
        for part, points in run_points(results).items()
        if points
    }
    ended = _newest(files.metrics)
    starts = [run.started for run in parts.values() if run.started is not None]
    return ExperimentRecord(
        name=preset.run_name,
        identity=flat,
        run=RunRecord(
            params=_used_params(flat, stages),
            points=headline_points(results),
            inputs=_experiment_inputs(stages),
            started=min([*starts, ended]) if ended is not None else None,
            ended=ended,
        ),
        parts=parts,
        tags=_tags(preset, files, stages, parts, facts),
        description=_description(facts),
        artifacts=[(files.params, ""), (files.page, "report"), (files.figures, "figures")],
    )


def _used_params(flat: Mapping[str, str], stages: Sequence[LockedStage]) -> dict[str, str]:
    """The params that stages depend on by dvc.lock, but for the entries of the parts, which have
    runs of their own. All params where there is no dvc.lock."""
    used = {key for stage in stages for key in stage.params}
    return {
        key: value
        for key, value in flat.items()
        if not key.startswith(_ENTRY_SECTIONS)
        and (not stages or any(key == name or key.startswith(f"{name}.") for name in used))
    }


def _part_params(settings: ReportSettings, flat: Mapping[str, str], part: str) -> dict[str, str]:
    """The params of a part, with the defaults of its section filled in; of the base model the
    section `base`."""
    kind, _, name = part.rpartition("/")
    entries: Mapping[str, Mapping[str, Any]] = {
        "": settings.models,
        "latents": settings.latents,
        "curves": settings.curves,
        "finetune": settings.finetune_runs,
    }
    if name not in entries[kind]:
        return {key: value for key, value in flat.items() if key.startswith(f"{name}.")}
    own = flatten_params(asdict(entries[kind][name]))
    for key in ("seed", "k_samples"):  # null in an entry: that of the experiment
        if own.get(key) == "null" and key in flat:
            own[key] = flat[key]
    return own


def _part_inputs(stages: Sequence[LockedStage], part: str) -> list[DataSet]:
    """The data that the stage of a part read."""
    name = part.replace("/", "@") if "/" in part else f"train@{part}"
    found = [stage for stage in stages if stage.name in (name, part)]
    return [data for stage in found for data in _data_sets(stage)]


def _experiment_inputs(stages: Sequence[LockedStage]) -> list[DataSet]:
    """The documents and chunks, what teachers wrote, and the local files that params name."""
    sources = [stage for stage in stages if stage.name.startswith("input@")]
    made = [s for s in stages if s.name == "split" or s.name.startswith("teacher@")]
    local = [data for stage in sources for data in _data_sets(stage)]
    return local + [
        DataSet(file.path, file.md5)
        for stage in made
        for file in stage.outputs
        if not file.path.startswith(_UNTRACKED)
    ]


def _data_sets(stage: LockedStage) -> list[DataSet]:
    return [DataSet(f.path, f.md5) for f in stage.inputs if not f.path.startswith(_UNTRACKED)]


def _part_times(
    timings: Path, part: str, lines: Sequence[Mapping[str, float]]
) -> dict[str, float | None]:
    """When a part began and ended, in seconds since 1970: the time at which its wall-clock figures
    were written, and the seconds that they give, before it. None where it was not measured."""
    kind, _, name = part.rpartition("/")
    path = timing_path(timings, kind or "train", name)
    if not (lines and path.is_file()):
        return {"started": None, "ended": None}
    ended = path.stat().st_mtime
    return {"started": ended - lines[-1].get("seconds", 0.0), "ended": ended}


def _newest(folder: Path) -> float | None:
    """When the newest file of a folder was written, in seconds since 1970."""
    times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
    return max(times, default=None)


def _tags(
    preset: Preset,
    files: TrackedFiles,
    stages: Sequence[LockedStage],
    parts: Mapping[str, RunRecord],
    facts: Mapping[str, Any],
) -> dict[str, str]:
    """Tags of the experiment's run; those that are not known are left out."""
    commit = git_commit()
    versions = facts.get("versions", {})
    hardware = [versions[key] for key in ("machine", "GPU") if key in versions]
    seconds = sum(
        max((point.value for point in run.points if point.metric == "seconds"), default=0.0)
        for run in parts.values()
    )
    cost = sum(_teacher_cost(files.metrics, s.name) for s in stages if "teacher@" in s.name)
    shown = dict(list(preset.changes.items())[:MAX_CHANGE_TAGS])
    tags = {
        "preset": preset.name,
        "changed": ", ".join(f"{key}={value}" for key, value in preset.changes.items()),
        "git_commit": commit,
        "mlflow.source.git.commit": commit.split()[0],
        "dvc_experiment": os.environ.get("DVC_EXP_NAME", "workspace"),
        "dvc_lock": _lock_digest(stages),
        "hardware": ", ".join(hardware),
        "wall_time": f"{seconds:,.0f} s of training and E-steps" if seconds else "",
        "teacher_cost": f"{cost:,.2f} US dollars",
    }
    tags |= {f"changed.{key}": value for key, value in shown.items()}
    return {key: value for key, value in tags.items() if value}


def _teacher_cost(metrics: Path, stage: str) -> float:
    path = metrics / "teacher" / f"{stage.partition('@')[2]}.json"
    return json.loads(path.read_text("utf-8")).get("cost_usd", 0) if path.is_file() else 0


def _lock_digest(stages: Sequence[LockedStage]) -> str:
    """A digest of what dvc.lock has of this experiment's stages: the same for the same code, params
    and data, whatever other stages the file has."""
    return hashlib.md5(json.dumps(stages).encode(), usedforsecurity=False).hexdigest()


def _description(facts: Mapping[str, Any]) -> str:
    """The summary and the warnings of the page, in Markdown."""
    sentences = [f"{number}. {text}" for number, text in enumerate(facts.get("summary", []), 1)]
    warnings = [f"- {text}" for text in facts.get("warnings", [])]
    head = ["", "**Warnings**", ""] if warnings else []
    return "\n".join([*sentences, *head, *warnings])
