"""The experiment's numbers in MLflow: one run for each experiment, with a child run for each part.

A stage that DVC restores from its run cache is not executed and would log nothing. Therefore stages
do not log their results; a last, cheap stage reads the metrics files of the whole experiment.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from boltlm.errors import UserError
from boltlm.reporting.results import MetricPoint

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT_NAME = "boltlm"
EXPERIMENT_KEY_TAG = "boltlm.key"  # identifies the run of an experiment
PARAMS_TAG = "boltlm.params"  # digest of the params of an experiment's run
PART_TAG = "boltlm.part"  # the part that a child run belongs to
CONTENT_TAG = "boltlm.content"  # digest of the points that a run was given
PARENT_TAG = "mlflow.parentRunId"
MAX_PARAM_CHARACTERS = 500  # MLflow's limit for the value of a parameter
_METRICS_PER_BATCH, _PARAMS_PER_BATCH = 1000, 100  # MLflow's limits


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentRecord:
    """What is logged of an experiment: its params as dotted keys, its own points, the points of
    each part by the part's name, files, and folders with all they contain. Folders that do not
    exist are skipped."""

    params: Mapping[str, str]
    points: Sequence[MetricPoint]
    parts: Mapping[str, Sequence[MetricPoint]]
    files: Sequence[Path]
    folders: Sequence[Path]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingStore:
    """An MLflow store: its URI, the folder for artifacts if the store is a database (a server has
    its own), and the file of the lock that experiments running at the same time share."""

    uri: str
    artifacts: Path
    lock: Path


def tracking_store(db: Path, artifacts: Path) -> TrackingStore:
    """The store at MLFLOW_TRACKING_URI if that is set, else the SQLite database `db`."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{db.resolve()}"
    return TrackingStore(
        uri=uri, artifacts=artifacts.resolve(), lock=db.with_name(f"{db.name}.lock")
    )


def log_experiment(record: ExperimentRecord, store: TrackingStore) -> str:
    """Log an experiment and return the id of its run.

    The run is named after DVC_EXP_NAME, or `workspace`. Logging the same experiment again (the same
    name; in the workspace, the same params) updates its run. A child run whose points changed is
    deleted and created again, because MLflow cannot remove a point. Raises UserError if MLflow
    cannot be reached or reports an error.
    """
    with mlflow_client(store) as client:
        run = experiment_run(client, store, record.params)
        _update_points(client, run, record.points)
        _update_children(client, run, record.parts)
        for file in record.files:
            client.log_artifact(run.info.run_id, str(file))
        for folder in record.folders:
            if folder.is_dir():
                client.log_artifacts(run.info.run_id, str(folder), folder.name)
        client.set_terminated(run.info.run_id)
    return run.info.run_id


@contextmanager
def mlflow_client(store: TrackingStore) -> Iterator["MlflowClient"]:
    """A client of the store, whose lock is held inside the `with` statement.

    Raises UserError where MLflow cannot be reached or reports an error inside it.
    """
    # MLflow reads this when it is imported; by default it sends usage data over the network.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with FileLock(store.lock):
        try:
            yield MlflowClient(tracking_uri=store.uri)
        except MlflowException as error:
            raise UserError(f"MLflow at {store.uri}: {error}") from error


def experiment_run(
    client: "MlflowClient", store: TrackingStore, params: Mapping[str, str]
) -> "Run":
    """The run of the experiment with these params, created if there is none. A run with the same
    name but other params is deleted with its children, because MLflow cannot change params."""
    experiment_id = _experiment_id(client, store)
    name = os.environ.get("DVC_EXP_NAME")
    content = _digest(params)
    key = _digest(["named", name] if name else ["workspace", content])
    for run in client.search_runs([experiment_id], f"tags.`{EXPERIMENT_KEY_TAG}` = '{key}'"):
        if run.data.tags.get(PARAMS_TAG) == content:
            return run
        for outdated in [*child_runs(client, run).values(), run]:
            client.delete_run(outdated.info.run_id)
    tags = {EXPERIMENT_KEY_TAG: key}
    run = client.create_run(experiment_id, run_name=name or "workspace", tags=tags)
    _log_params(client, run, params)
    client.set_tag(run.info.run_id, PARAMS_TAG, content)
    return run


def child_runs(client: "MlflowClient", parent: "Run") -> dict[str, "Run"]:
    """The child runs of an experiment's run by the part that each belongs to."""
    runs = client.search_runs(
        [parent.info.experiment_id], f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'"
    )
    return {run.data.tags[PART_TAG]: run for run in runs if PART_TAG in run.data.tags}


def create_child(client: "MlflowClient", parent: "Run", part: str) -> "Run":
    """A new, empty child run for a part."""
    tags = {PARENT_TAG: parent.info.run_id, PART_TAG: part}
    return client.create_run(parent.info.experiment_id, run_name=part, tags=tags)


def log_points(client: "MlflowClient", run: "Run", points: Sequence[MetricPoint]) -> None:
    """Log points in batches of the size that MLflow accepts. Raises MlflowException."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(point.metric, point.value, now, point.step) for point in points]
    for start in range(0, len(metrics), _METRICS_PER_BATCH):
        client.log_batch(run.info.run_id, metrics=metrics[start : start + _METRICS_PER_BATCH])


def _experiment_id(client: "MlflowClient", store: TrackingStore) -> str:
    """The MLflow experiment that all runs belong to, created if there is none."""
    from mlflow.store.db.db_types import DATABASE_ENGINES

    experiment = client.get_experiment_by_name(EXPERIMENT_NAME)
    if experiment is None:
        is_database = store.uri.split(":")[0].split("+")[0] in DATABASE_ENGINES
        location = store.artifacts.as_uri() if is_database else None
        return client.create_experiment(EXPERIMENT_NAME, artifact_location=location)
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"MLflow experiment '{EXPERIMENT_NAME}' was deleted; restore it with: mlflow"
            f" experiments restore --experiment-id {experiment.experiment_id}"
        )
    return experiment.experiment_id


def _log_params(client: "MlflowClient", run: "Run", params: Mapping[str, str]) -> None:
    """Log params; long values are shortened, because params.yaml itself is logged as a file."""
    from mlflow.entities import Param

    logged = [Param(key, _shortened(value)) for key, value in params.items()]
    for start in range(0, len(logged), _PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, params=logged[start : start + _PARAMS_PER_BATCH])


def _shortened(value: str) -> str:
    if len(value) <= MAX_PARAM_CHARACTERS:
        return value
    return value[: MAX_PARAM_CHARACTERS - 1] + "…"


def _update_points(client: "MlflowClient", run: "Run", points: Sequence[MetricPoint]) -> None:
    """Log the points whose last logged value differs."""
    content = _digest(points)
    if run.data.tags.get(CONTENT_TAG) == content:
        return
    logged = {
        (metric.key, metric.step): metric.value
        for key in sorted(run.data.metrics)
        for metric in sorted(
            client.get_metric_history(run.info.run_id, key), key=lambda metric: metric.timestamp
        )
    }
    changed = [point for point in points if logged.get((point.metric, point.step)) != point.value]
    log_points(client, run, changed)
    client.set_tag(run.info.run_id, CONTENT_TAG, content)


def _update_children(
    client: "MlflowClient", parent: "Run", parts: Mapping[str, Sequence[MetricPoint]]
) -> None:
    """A child run for each part that has points; that of a part without points is deleted."""
    contents = {part: _digest(points) for part, points in parts.items() if points}
    unchanged: set[str] = set()
    for part, run in child_runs(client, parent).items():
        if part in contents and run.data.tags.get(CONTENT_TAG) == contents[part]:
            unchanged.add(part)
        else:
            client.delete_run(run.info.run_id)
    for part in [part for part in contents if part not in unchanged]:
        run = create_child(client, parent, part)
        log_points(client, run, parts[part])
        client.set_terminated(run.info.run_id)
        client.set_tag(run.info.run_id, CONTENT_TAG, contents[part])


def _digest(facts: Any) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
