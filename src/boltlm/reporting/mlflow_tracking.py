"""The experiment's numbers in MLflow: one run for each experiment, with a child run for each part.

A stage that DVC restores from its run cache is not executed and would log nothing. Therefore stages
do not log their results; a last, cheap stage reads the metrics files of the whole experiment.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from boltlm.fingerprint import hash_path
from boltlm.reporting.mlflow_store import TrackingStore, experiment_id, mlflow_client
from boltlm.reporting.results import MetricPoint

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT_KEY_TAG = "boltlm.key"  # identifies the run of an experiment
PART_TAG = "boltlm.part"  # the part that a child run belongs to
CONTENT_TAG = "boltlm.content"  # digest of what a run was given; missing while it is incomplete
PARENT_TAG = "mlflow.parentRunId"
DESCRIPTION_TAG = "mlflow.note.content"
MAX_PARAM_CHARACTERS = 500  # MLflow's limit for the value of a parameter
MAX_TAG_CHARACTERS = 5000  # and for that of a tag
MAX_DIGEST_CHARACTERS = 36  # and for the digest of a data set
_METRICS_PER_BATCH, _PARAMS_PER_BATCH = 1000, 100  # MLflow's limits


class DataSet(NamedTuple):
    """A file or folder that a run reads: its path, and its hash in dvc.lock."""

    path: str
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What is logged of a run. `started` and `ended` are in seconds since 1970, None: unknown."""

    params: Mapping[str, str] = field(default_factory=dict)
    points: Sequence[MetricPoint] = ()
    inputs: Sequence[DataSet] = ()
    started: float | None = None
    ended: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentRecord:
    """What is logged of an experiment: the name of its run, all its params as dotted keys (they
    identify it), its own run, that of each part by the part's name, tags, a description in
    Markdown, and artifacts: files and folders by the folder of artifacts that they belong to ("":
    the top). Files and folders that do not exist are skipped."""

    name: str
    identity: Mapping[str, str]
    run: RunRecord
    parts: Mapping[str, RunRecord]
    tags: Mapping[str, str]
    description: str
    artifacts: Sequence[tuple[Path, str]]


def log_experiment(record: ExperimentRecord, store: TrackingStore) -> str:
    """Log an experiment and return the id of its run.

    An experiment is known by DVC_EXP_NAME; in the workspace, where there is none, by its params. If
    it has been logged with this very content, nothing is done; a run with another content is
    deleted with its children and logged anew, because MLflow can change neither params nor points.
    Raises UserError if MLflow reports an error, TrackingServerError where it is a server.
    """
    content = _content(record)
    with mlflow_client(store) as client:
        experiment = experiment_id(client, store)
        key = _experiment_key(record.identity)
        for run in _runs_with_key(client, experiment, key):
            if run.data.tags.get(CONTENT_TAG) == content:
                return run.info.run_id
            for outdated in [*child_runs(client, run).values(), run]:
                client.delete_run(outdated.info.run_id)
        tags = {EXPERIMENT_KEY_TAG: key, DESCRIPTION_TAG: record.description, **record.tags}
        parent = _create_run(client, experiment, record.name, record.run, tags)
        _log_run(client, parent, record.run)
        for part, part_record in record.parts.items():
            tags = {PARENT_TAG: parent, PART_TAG: part}
            child = _create_run(client, experiment, part, part_record, tags)
            _log_run(client, child, part_record)
            client.set_terminated(child, end_time=_milliseconds(part_record.ended))
        for path, folder in record.artifacts:
            if path.is_dir():
                client.log_artifacts(parent, str(path), folder or None)
            elif path.is_file():
                client.log_artifact(parent, str(path), folder or None)
        client.set_tag(parent, CONTENT_TAG, content)
        client.set_terminated(parent, end_time=_milliseconds(record.run.ended))
    return parent


def live_run(
    client: "MlflowClient", store: TrackingStore, identity: Mapping[str, str], part: str
) -> "Run":
    """A new, empty child run for a part of an experiment that is running. The experiment's run is
    created if there is none; `log_experiment` will replace both."""
    experiment = experiment_id(client, store)
    key = _experiment_key(identity)
    parent = next(iter(_runs_with_key(client, experiment, key)), None)
    if parent is None:
        name = os.environ.get("DVC_EXP_NAME", "workspace")
        parent = client.create_run(experiment, run_name=name, tags={EXPERIMENT_KEY_TAG: key})
    if CONTENT_TAG in parent.data.tags:
        client.delete_tag(parent.info.run_id, CONTENT_TAG)
    if outdated := child_runs(client, parent).get(part):
        client.delete_run(outdated.info.run_id)
    tags = {PARENT_TAG: parent.info.run_id, PART_TAG: part}
    return client.create_run(experiment, run_name=part, tags=tags)


def child_runs(client: "MlflowClient", parent: "Run") -> dict[str, "Run"]:
    """The child runs of an experiment's run by the part that each belongs to."""
    runs = client.search_runs(
        [parent.info.experiment_id], f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'"
    )
    return {run.data.tags[PART_TAG]: run for run in runs if PART_TAG in run.data.tags}


def log_points(client: "MlflowClient", run_id: str, points: Sequence[MetricPoint]) -> None:
    """Log points in batches of the size that MLflow accepts. Raises MlflowException."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(point.metric, point.value, now, point.step) for point in points]
    for start in range(0, len(metrics), _METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _METRICS_PER_BATCH])


def _runs_with_key(client: "MlflowClient", experiment: str, key: str) -> Sequence["Run"]:
    return client.search_runs([experiment], f"tags.`{EXPERIMENT_KEY_TAG}` = '{key}'")


def _create_run(
    client: "MlflowClient", experiment: str, name: str, record: RunRecord, tags: Mapping[str, str]
) -> str:
    """The id of a new run; long tags are shortened."""
    shortened = {key: _shortened(value, MAX_TAG_CHARACTERS) for key, value in tags.items()}
    run = client.create_run(
        experiment, run_name=name, tags=shortened, start_time=_milliseconds(record.started)
    )
    return run.info.run_id


def _log_run(client: "MlflowClient", run_id: str, record: RunRecord) -> None:
    """Params, points and data sets. Long params are shortened: params.yaml is an artifact."""
    from mlflow.entities import Dataset, DatasetInput, Param

    params = [Param(k, _shortened(v, MAX_PARAM_CHARACTERS)) for k, v in record.params.items()]
    for start in range(0, len(params), _PARAMS_PER_BATCH):
        client.log_batch(run_id, params=params[start : start + _PARAMS_PER_BATCH])
    log_points(client, run_id, record.points)
    datasets = [
        Dataset(
            name=path,
            digest=digest[:MAX_DIGEST_CHARACTERS],
            source_type="local",
            source=json.dumps({"uri": path}),
        )
        for path, digest in record.inputs
    ]
    if datasets:
        client.log_inputs(run_id, [DatasetInput(dataset=dataset) for dataset in datasets])


def _shortened(value: str, limit: int) -> str:
    return value if len(value) <= limit else value[: limit - 1] + "…"


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)


def _experiment_key(identity: Mapping[str, str]) -> str:
    name = os.environ.get("DVC_EXP_NAME")
    return _digest(["named", name] if name else ["workspace", _digest(identity)])


def _content(record: ExperimentRecord) -> str:
    """A digest of what an experiment's runs hold, times and tags (commit, machine) aside."""
    runs = {"": record.run, **record.parts}
    numbers = {
        part: [asdict(run)[key] for key in ("params", "points", "inputs")]
        for part, run in runs.items()
    }
    files = {path.name: hash_path(path) for path, _ in record.artifacts if path.exists()}
    return _digest([record.name, record.identity, numbers, record.description, files])


def _digest(facts: Any) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
