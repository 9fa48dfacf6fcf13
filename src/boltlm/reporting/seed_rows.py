"""Finished DVC experiments as rows: the metrics of each model with the seeds behind them.

An experiment is a commit, or a copy of the repository, with params.yaml, dvc.lock and metrics/.
What a metrics file was made with is read from dvc.lock: the params of its stage and of every stage
before it. A file whose history there does not fit together, because a part was made again later
(`dvc exp run` with targets), is left out and named. Rows whose params differ by seeds alone have
the same `group`, which says how the other params differ from those of the workspace.

Entries of `models` that are equal but for their `seed` are trainings of the first of them.
"""

import fnmatch
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from boltlm.errors import UserError
from boltlm.fingerprint import fingerprint
from boltlm.params import flatten_params
from boltlm.reporting.arms import BASE_MODEL, training_of

# Folders of metrics/ with a file for each part of an experiment, and the section of params.yaml
# that names these parts. Parts of `eval` have the name of their model, others `<folder>/<name>`.
METRIC_FOLDERS = {
    "eval": "models",
    "train": "models",
    "finetune": "finetune.runs",
    "latents": "latents",
    "teacher": "teachers",
}
_MAX_NAMED_CHANGES = 3  # params that a group names; of more differences the rest is a digest
# Neither how a stage is executed (docs/scale.md) nor which tasks are asked changes a metric that
# two experiments both have, so groups do not tell these apart.
INERT_KEYS = frozenset(
    {f"sampling.{key}" for key in ("batch_tokens", "executor", "workers", "gpus_per_worker")}
    | {f"sampling.{key}" for key in ("gpu_memory_utilization", "threads", "address")}
    | {"finetune.workers", "evaluate.batch_size", "evaluate.tasks"}
)
OPTIONAL_BOUND = "evaluate.large_k"  # has metrics of its own, so to leave it out changes no other


class Seeds(NamedTuple):
    """The seeds of the data, of the experiment (sampling), and of the model's training."""

    data_seed: int
    seed: int
    train_seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedRow:
    """The metrics of one part of one experiment; `model`: the part, of trainings of one model the
    first. `group`: how its params differ from the reference by more than seeds; empty: not."""

    group: str
    model: str
    seeds: Seeds
    metrics: Mapping[str, float]

    @property
    def key(self) -> tuple[str, str, Seeds]:
        return self.group, self.model, self.seeds


class _Experiment:
    """Its name, and the content of its files by their paths. `removal`: how to leave it out."""

    def __init__(self, name: str, files: Mapping[str, bytes], removal: str) -> None:
        self.name, self.files, self.removal = name, files, removal
        self.params, lock = self._yaml("params.yaml"), self._yaml("dvc.lock")
        self.stages: dict[str, Any] = lock.get("stages") or {}

    def _yaml(self, name: str) -> dict[str, Any]:
        content = yaml.load(self.files.get(name, b""), yaml.CSafeLoader)
        return content if isinstance(content, dict) else {}


class _StaleError(Exception):
    """The metrics file does not belong to the rest of the experiment; says why."""


def collect_rows(
    reference: Any, patterns: Sequence[str], folders: Sequence[Path] = ()
) -> tuple[list[SeedRow], list[str]]:
    """The rows of every experiment of this repository, or of copies of it in `folders`, sorted, and
    what was left out with its reason. `reference`: the params to which groups are relative;
    `patterns`: of the metrics (`*` as in file names).

    Raises UserError if git fails, if there are no experiments, if one has no seeds, or if the same
    part with the same params and seeds has different metrics.
    """
    rows: dict[tuple[str, str, Seeds], SeedRow] = {}
    left_out: list[str] = []
    for experiment in map(_read_folder, folders) if folders else _experiments():
        for file, part in metric_parts(experiment.params):
            path = f"metrics/{file}"
            if path not in experiment.files:
                continue
            try:
                history = _history(experiment, path)
            except _StaleError as reason:
                left_out.append(f"{experiment.name}: {path}: {reason}")
                continue
            metrics = select_metrics(json.loads(experiment.files[path]), patterns)
            row = _row(experiment, reference, part, history, metrics)
            if metrics and rows.setdefault(row.key, row) != row:
                raise UserError(
                    f"{experiment.name}: another experiment has other metrics of {part} with the"
                    f" same params and seeds {tuple(row.seeds)}, so code or input files differ;"
                    f" leave one out ({experiment.removal})"
                )
    return [rows[key] for key in sorted(rows)], left_out


def select_metrics(metrics: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, float]:
    """The numbers whose names match a pattern, without standard errors, sorted by name."""
    return {
        name: float(value)
        for name, value in sorted(metrics.items())
        if isinstance(value, int | float) and not name.endswith("_se")
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def _experiments() -> Iterator[_Experiment]:
    """The experiments below refs/exps/<2 digits of the baseline commit>/<38 digits>/<name>."""
    refs = _git("for-each-ref", "refs/exps", "--format=%(refname)").decode().split()
    refs = [ref for ref in refs if len(ref.split("/")) == 5]  # others belong to DVC's queue
    if not refs:
        raise UserError(
            "this repository has no finished DVC experiments; queue some with `dvc exp run --queue"
            " -S seed=1,2,3` and run them with `dvc queue start`"
        )
    for ref in refs:
        with tarfile.open(fileobj=io.BytesIO(_git("archive", "--format=tar", ref))) as archive:
            files = {
                member.name: opened.read()
                for member in archive
                if member.name in ("params.yaml", "dvc.lock") or member.name.startswith("metrics/")
                if (opened := archive.extractfile(member)) is not None
            }
        name = ref.split("/")[-1]
        yield _Experiment(name, files, f"dvc exp remove {name}")


def _read_folder(folder: Path) -> _Experiment:
    paths = [folder / "params.yaml", folder / "dvc.lock", *folder.glob("metrics/*/*.json")]
    found = {str(path.relative_to(folder)): path for path in paths if path.is_file()}
    if "params.yaml" not in found or "dvc.lock" not in found:
        raise UserError(f"{folder}: no params.yaml or no dvc.lock; run dvc repro there")
    files = {name: path.read_bytes() for name, path in found.items()}
    return _Experiment(str(folder), files, "not in --folders")


def metric_parts(params: Any) -> Iterator[tuple[str, str]]:
    """For each entry of params.yaml its file below metrics/ and the name of the part."""
    for folder, section in METRIC_FOLDERS.items():
        names = list(_lookup(params, section) or {})
        for name in (*names, BASE_MODEL) if folder == "eval" else names:
            yield f"{folder}/{name}.json", name if folder == "eval" else f"{folder}/{name}"


def _history(experiment: _Experiment, path: str) -> dict[str, Any]:
    """The params, by their keys, of the stage that wrote `path` and of all before it, as dvc.lock
    has them. Raises _StaleError where parts of that history do not belong together."""
    stages, content = experiment.stages, experiment.files[path]
    makers = {out["path"]: (name, out) for name, s in stages.items() for out in s.get("outs", [])}
    if path not in makers:
        raise _StaleError("dvc.lock does not say how it was made")
    if makers[path][1].get("md5") != hashlib.md5(content, usedforsecurity=False).hexdigest():
        raise _StaleError("not the file of which dvc.lock has the hash")
    history: dict[str, Any] = {}
    waiting, seen = [makers[path][0]], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for key, value in stages[name].get("params", {}).get("params.yaml", {}).items():
            if history.setdefault(key, value) != value:
                raise _StaleError(f"{name} was made with another {key}")
        for dep in stages[name].get("deps", []):
            for out, (maker, made) in makers.items():
                if dep["path"] == out and dep.get("md5") != made.get("md5"):
                    raise _StaleError(f"{name} was made from an earlier {out}")
                if dep["path"] == out or dep["path"].startswith(f"{out}/"):
                    waiting.append(maker)
    return history


def _row(
    experiment: _Experiment, reference: Any, part: str, history: dict[str, Any], metrics: Any
) -> SeedRow:
    """The row of one part, made with the params in `history`."""
    params = experiment.params
    first, own = first_training(params, part)
    seed = history.pop("seed", params.get("seed"))
    data_seed = history.pop("data_seed", params.get("data_seed", seed))
    for key, value in (("seed", seed), ("data_seed", data_seed)):
        if not isinstance(value, int):
            raise UserError(
                f"{experiment.name}: params.yaml has {key} = {value!r}, which must be an integer;"
                f" leave this experiment out ({experiment.removal})"
            )
    _use_first(params, part, first, history)
    return SeedRow(
        group=_describe_changes(history, reference),
        model=first,
        seeds=Seeds(data_seed, seed, seed if own is None else own),
        metrics=metrics,
    )


def _use_first(params: Any, part: str, first: str, history: dict[str, Any]) -> None:
    """Let the entries of the part, without its seed, be those of the first training."""
    folder, _, name = part.rpartition("/")
    first_name = first.rpartition("/")[2]
    model, first_model = name, first_name
    if folder == "finetune":
        runs = _lookup(params, "finetune.runs")
        model, first_model = runs[name]["model"], runs[first_name]["model"]
        run = history.pop(f"finetune.runs.{name}", {})
        history[f"finetune.runs.{first_name}"] = {**run, "model": first_model}
    if folder not in ("latents", "teacher") and f"models.{model}" in history:
        entry = history.pop(f"models.{model}")
        history[f"models.{first_model}"] = {k: v for k, v in entry.items() if k != "seed"}


def first_training(params: Any, part: str) -> tuple[str, int | None]:
    """The first of the parts that are this one with another seed of the training of its model, and
    that seed of its own, None where it has that of the experiment."""
    folder, _, name = part.rpartition("/")
    models, runs = params.get("models") or {}, _lookup(params, "finetune.runs") or {}
    model = runs[name]["model"] if folder == "finetune" else name
    if model not in models or folder in ("latents", "teacher"):
        return part, None
    seed = models[model].get("seed", _lookup(params, "model_defaults.seed"))
    if folder != "finetune":
        first = training_of(models, model)
        return f"{folder}/{first}" if folder else first, seed
    firsts = {
        run: {**entry, "model": training_of({BASE_MODEL: {}, **models}, entry["model"])}
        for run, entry in runs.items()
    }
    return f"finetune/{next(run for run in firsts if firsts[run] == firsts[name])}", seed


def _describe_changes(history: Mapping[str, Any], reference: Any) -> str:
    """`key=value` for each param that differs from the reference, the seed of a training aside."""
    own, other = flatten_params(history), {}
    for key in history:
        value = _lookup(reference, key)
        if key.startswith("models.") and isinstance(value, dict) and "seed" not in history[key]:
            value = {name: item for name, item in value.items() if name != "seed"}
        other |= flatten_params({} if value is None and key not in own else {key: value})
    is_measured = "null" not in (own.get(OPTIONAL_BOUND), other.get(OPTIONAL_BOUND))
    changes = [
        f"{key}={own.get(key, 'absent')}"
        for key in sorted(own | other)
        if own.get(key) != other.get(key) and key not in INERT_KEYS
        if is_measured or not key.startswith(OPTIONAL_BOUND)
    ]
    if len(changes) <= _MAX_NAMED_CHANGES:
        return ", ".join(changes)
    named, rest = changes[:_MAX_NAMED_CHANGES], changes[_MAX_NAMED_CHANGES:]
    return f"{', '.join(named)} and {len(rest)} more ({fingerprint({'changes': rest})[:8]})"


def _lookup(params: Any, key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    for part in key.split("."):
        params = params.get(part) if isinstance(params, dict) else None
    return params


def _git(*arguments: str) -> bytes:
    command = ("git", *arguments)
    try:
        return subprocess.run(command, check=True, capture_output=True).stdout
    except subprocess.CalledProcessError as error:
        message = error.stderr.decode(errors="replace").strip()
        raise UserError(f"{' '.join(command)} failed: {message}") from error
