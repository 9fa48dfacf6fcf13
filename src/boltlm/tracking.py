"""The experiment's numbers in MLflow: one run an experiment, under it a child for each part.

A stage that DVC restores from its run cache does not run and so logs nothing; therefore nothing is
logged where it happens, and a cheap last stage reads the metrics files of the whole experiment.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from boltlm.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "boltlm"
# Tags: what a parent is found by, what its params were, what a child is of, what was logged.
KEY, PARAMS, PART, CONTENT = "boltlm.key", "boltlm.params", "boltlm.part", "boltlm.content"
PARENT = "mlflow.parentRunId"
MOST_CHARACTERS = 500  # of a parameter's value
SECONDS_OF_SILENCE = 300.0  # of a live curve after an error
_METRICS_A_BATCH, _PARAMS_A_BATCH = 1000, 100  # MLflow's limits

Point = tuple[str, float, int]  # metric, value, step


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """What is logged of an experiment: its params, its own points, those of each part by the
    part's name, and files and whole folders; a folder that is not there is not logged."""

    params: Mapping[str, Any]
    points: Sequence[Point]
    parts: Mapping[str, Sequence[Point]]
    files: Sequence[Path]
    folders: Sequence[Path]


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """Where the runs go: the address of an MLflow store, the folder for files where the store is
    a database (a server has its own), and the lock that parallel experiments wait at."""

    uri: str
    artifacts: Path
    lock: Path


def store(db: Path, artifacts: Path) -> Store:
    """The SQLite database `db`, or what the environment's MLFLOW_TRACKING_URI names."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{db.resolve()}"
    return Store(uri=uri, artifacts=artifacts.resolve(), lock=db.with_name(f"{db.name}.lock"))


def log(experiment: Experiment, place: Store) -> str:
    """Log an experiment and return the id of its run.

    The run is named by DVC_EXP_NAME, or `workspace`; tracking the same experiment again (the
    same name; in the workspace the same params) updates its run. A child whose numbers changed is
    deleted and made again, for MLflow cannot take back a point. Raises UserError where MLflow
    cannot be reached or refuses.
    """
    # MLflow reports its use over the network unless told not to, before it is imported.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with FileLock(place.lock):
        try:
            client = MlflowClient(tracking_uri=place.uri)
            run = _parent(client, _experiment_id(client, place), experiment.params)
            _update(client, run, experiment.points)
            _children(client, run, experiment.parts)
            for file in experiment.files:
                client.log_artifact(run.info.run_id, str(file))
            for folder in experiment.folders:
                if folder.is_dir():
                    client.log_artifacts(run.info.run_id, str(folder), folder.name)
            client.set_terminated(run.info.run_id)
        except MlflowException as error:
            raise UserError(f"MLflow at {place.uri}: {error}") from error
    return run.info.run_id


def live(
    params: Mapping[str, Any], part: str, place: Store
) -> Callable[[Mapping[str, float]], None]:
    """A function that logs one line of a part's curve (with its `step`) as soon as there is one,
    in a run that `log` replaces when all is done. What MLflow refuses is said once and left out,
    and for a while nothing more is sent: the curve's file has it all. Raises
    UserError where MLflow cannot be reached at the start."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a training waits meanwhile
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with FileLock(place.lock):
        try:
            client = MlflowClient(tracking_uri=place.uri)
            parent = _parent(client, _experiment_id(client, place), params)
            if old := _existing(client, parent).get(part):
                client.delete_run(old.info.run_id)
            tags = {PARENT: parent.info.run_id, PART: part}
            run = client.create_run(parent.info.experiment_id, run_name=part, tags=tags)
        except MlflowException as error:
            raise UserError(f"MLflow at {place.uri}: {error}") from error
    said, silent_until = False, 0.0

    def tell(line: Mapping[str, float]) -> None:
        nonlocal said, silent_until
        if time.monotonic() < silent_until:
            return
        step = int(line["step"])
        points = [(name, value, step) for name, value in line.items() if name != "step"]
        try:
            _log(client, run, points, {})
        except MlflowException as error:
            silent_until = time.monotonic() + SECONDS_OF_SILENCE
            if not said:
                print(f"MLflow at {place.uri}: {error}; the run goes on", file=sys.stderr)
            said = True

    return tell


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested params as dotted keys; lists as JSON. Long values end in …: params.yaml is logged
    whole beside them."""
    found: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{name}.")
            continue
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        found[name] = text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"
    return found


def _experiment_id(client: "MlflowClient", place: Store) -> str:
    from mlflow.store.db.db_types import DATABASE_ENGINES

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        database = place.uri.split(":")[0].split("+")[0] in DATABASE_ENGINES
        location = place.artifacts.as_uri() if database else None
        return client.create_experiment(EXPERIMENT, artifact_location=location)
    if found.lifecycle_stage != "active":
        raise UserError(
            f"MLflow experiment '{EXPERIMENT}' was deleted; restore it with: mlflow experiments"
            f" restore --experiment-id {found.experiment_id}"
        )
    return found.experiment_id


def _parent(client: "MlflowClient", experiment: str, params: Mapping[str, Any]) -> "Run":
    """The experiment's run, made where there is none; one of the same name but other params is
    deleted with its children, for MLflow's params cannot be changed."""
    name = os.environ.get("DVC_EXP_NAME")
    content = _digest(params)
    key = _digest(["named", name] if name else ["workspace", content])
    for run in client.search_runs([experiment], f"tags.`{KEY}` = '{key}'"):
        if run.data.tags.get(PARAMS) == content:
            return run
        for old in [*_existing(client, run).values(), run]:
            client.delete_run(old.info.run_id)
    run = client.create_run(experiment, run_name=name or "workspace", tags={KEY: key})
    _log(client, run, [], flatten(params))
    client.set_tag(run.info.run_id, PARAMS, content)
    return run


def _update(client: "MlflowClient", run: "Run", points: Sequence[Point]) -> None:
    """Log those points whose latest logged value differs; nothing where nothing changed."""
    content = _digest(points)
    if run.data.tags.get(CONTENT) == content:
        return
    known = {
        (metric.key, metric.step): metric.value
        for key in sorted(run.data.metrics)
        for metric in sorted(
            client.get_metric_history(run.info.run_id, key), key=lambda metric: metric.timestamp
        )
    }
    _log(client, run, [p for p in points if known.get((p[0], p[2])) != p[1]], {})
    client.set_tag(run.info.run_id, CONTENT, content)


def _children(client: "MlflowClient", parent: "Run", parts: Mapping[str, Sequence[Point]]) -> None:
    """A run for each part that has points; one for a part that no longer has any is deleted."""
    wanted = {part: points for part, points in parts.items() if points}
    existing = _existing(client, parent)
    for part, run in existing.items():
        if run.data.tags.get(CONTENT) != _digest(wanted.get(part)):
            client.delete_run(run.info.run_id)
    for part, points in wanted.items():
        content = _digest(points)
        if part in existing and existing[part].data.tags.get(CONTENT) == content:
            continue
        tags = {PARENT: parent.info.run_id, PART: part}
        run = client.create_run(parent.info.experiment_id, run_name=part, tags=tags)
        _log(client, run, points, {})
        client.set_terminated(run.info.run_id)
        client.set_tag(run.info.run_id, CONTENT, content)


def _existing(client: "MlflowClient", parent: "Run") -> dict[str, "Run"]:
    runs = client.search_runs(
        [parent.info.experiment_id], f"tags.`{PARENT}` = '{parent.info.run_id}'"
    )
    return {run.data.tags[PART]: run for run in runs if PART in run.data.tags}


def _log(
    client: "MlflowClient", run: "Run", points: Sequence[Point], params: Mapping[str, str]
) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    metrics = [Metric(key, value, now, step) for key, value, step in points]
    for start in range(0, len(metrics), _METRICS_A_BATCH):
        client.log_batch(run.info.run_id, metrics=metrics[start : start + _METRICS_A_BATCH])
    logged = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(logged), _PARAMS_A_BATCH):
        client.log_batch(run.info.run_id, params=logged[start : start + _PARAMS_A_BATCH])


def _digest(facts: Any) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
