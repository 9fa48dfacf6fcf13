"""A training curve in MLflow while the training is still running."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from boltlm.reporting.mlflow_tracking import (
    TrackingStore,
    child_runs,
    create_child,
    experiment_run,
    log_points,
    mlflow_client,
    tracking_store,
)
from boltlm.reporting.results import MetricPoint

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

__all__ = ["live_logger", "tracking_store"]  # all that the stage `train` needs

RETRY_AFTER_SECONDS = 300.0  # pause after MLflow reported an error


def live_logger(
    params: Mapping[str, str], part: str, store: TrackingStore
) -> Callable[[Mapping[str, float]], None]:
    """A function that logs one line of a part's training curve, which includes its `step`.

    `params` are those of the experiment as dotted keys. The lines go to a child run that
    `log_experiment` replaces when the experiment is finished. Raises UserError if MLflow cannot be
    reached at the start; a later error never ends the training (see `_LiveRun`).
    """
    # Set before MLflow is imported: a training must not wait for many retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with mlflow_client(store) as client:
        parent = experiment_run(client, store, params)
        if outdated := child_runs(client, parent).get(part):
            client.delete_run(outdated.info.run_id)
        run = create_child(client, parent, part)
    return _LiveRun(client, run, store.uri).log


class _LiveRun:
    """The child run that grows with a training.

    Lines that MLflow does not accept are lost there; the curve's CSV file has all of them. After
    an error nothing is sent for RETRY_AFTER_SECONDS, and only the first error is reported.
    """

    def __init__(self, client: "MlflowClient", run: "Run", uri: str) -> None:
        self._client, self._run, self._uri = client, run, uri
        self._reported = False
        self._paused_until = 0.0

    def log(self, line: Mapping[str, float]) -> None:
        """Log the values of a line at its `step`."""
        from mlflow.exceptions import MlflowException

        if time.monotonic() < self._paused_until:
            return
        step = int(line["step"])
        points = [MetricPoint(name, value, step) for name, value in line.items() if name != "step"]
        try:
            log_points(self._client, self._run, points)
        except MlflowException as error:
            self._paused_until = time.monotonic() + RETRY_AFTER_SECONDS
            if not self._reported:
                print(f"MLflow at {self._uri}: {error}; training continues", file=sys.stderr)
            self._reported = True
