"""Where runs are logged: the local database or a server, which may be out of reach."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from boltlm.errors import UserError
from boltlm.shard_store import exclusive_lock

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT_NAME = "boltlm"
PROBE_SECONDS = 5.0  # how long a server may take for a first answer
# MLflow reads these when it is imported. By default it sends usage data over the network and tries
# a request to a server that does not answer for many minutes.
_MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


class TrackingServerError(UserError):
    """A tracking server does not answer, or refused a request. No reason to end a stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingStore:
    """An MLflow store: its URI, the folder for artifacts if the store is a database (a server has
    its own), and the local database, beside which is the lock that experiments running at the same
    time share."""

    uri: str
    artifacts: Path
    database: Path

    @property
    def is_server(self) -> bool:
        return urlsplit(self.uri).scheme in ("http", "https")

    def masked(self, text: object) -> str:
        """A text in which a password of the URI is asterisks."""
        password = urlsplit(self.uri).password
        masked = str(text)
        for secret in {password, unquote(password)} if password else ():
            masked = masked.replace(secret, "***")
        return masked


def tracking_store(db: Path, artifacts: Path) -> TrackingStore:
    """The store at MLFLOW_TRACKING_URI if that is set, else the SQLite database `db`."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{db.resolve()}"
    return TrackingStore(uri=uri, artifacts=artifacts.resolve(), database=db)


@contextmanager
def mlflow_client(store: TrackingStore) -> Iterator["MlflowClient"]:
    """A client of the store, whose lock is held inside the `with` statement.

    Raises TrackingServerError where a server does not answer within PROBE_SECONDS or reports an
    error, and UserError where a database does.
    """
    for name, value in _MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    import requests

    kind = TrackingServerError if store.is_server else UserError
    try:
        if store.is_server:
            requests.get(f"{store.uri.rstrip('/')}/health", timeout=PROBE_SECONDS)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import DBAPIError
    except requests.RequestException as error:
        raise kind(store.masked(f"MLflow at {store.uri} does not answer: {error}")) from None

    with exclusive_lock(store.database, "MLflow"):
        try:
            yield MlflowClient(tracking_uri=store.uri)
        except DBAPIError as error:  # MLflow wraps it only after it has opened the database
            text = f"MLflow's database {store.uri}: {error.orig}; if it is damaged, move it away"
            raise UserError(store.masked(f"{text} and run dvc repro track")) from error
        except (MlflowException, requests.RequestException) as error:
            raise kind(store.masked(f"MLflow at {store.uri}: {error}")) from None


def experiment_id(client: "MlflowClient", store: TrackingStore) -> str:
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
