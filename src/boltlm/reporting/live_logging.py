"""A training curve in MLflow while the training is still running."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from boltlm.reporting.mlflow_store import (
    TrackingServerError,
    TrackingStore,
    mlflow_client,
    tracking_store,
)
from boltlm.reporting.mlflow_tracking import live_run, log_points
from boltlm.reporting.results import MetricPoint

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["live_logger", "tracking_store"]  # all that the stage `train` needs

RETRY_AFTER_SECONDS = 300.0  # pause after MLflow reported an error


def live_logger(
    identity: Mapping[str, str], part: str, store: TrackingStore
) -> Callable[[Mapping[str, float]], None] | None:
    """A function that logs one line of a part's training curve, which includes its `step`.

    `identity`: the params of the experiment as dotted keys. The lines go to a child run that
    `log_experiment` replaces when the experiment is finished. None, after a warning, where a server
    does not answer; a later error never ends the training (see `_LiveRun`). Raises UserError if the
    database reports an error.
    """
    try:
        with mlflow_client(store) as client:
            run_id = live_run(client, store, identity, part).info.run_id
    except TrackingServerError as error:
        print(f"warning: {error}; the training is not logged live", file=sys.stderr)
        return None
    return _LiveRun(client, run_id, store).log


class _LiveRun:
    """The child run that grows with a training.

    Lines that MLflow does not accept are lost there; the curve's CSV file has all of them. After
    an error nothing is sent for RETRY_AFTER_SECONDS, and only the first error is reported.
    """

    def __init__(self, client: "MlflowClient", run_id: str, store: TrackingStore) -> None:
        self._client, self._run_id, self._store = client, run_id, store
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
            log_points(self._client, self._run_id, points)
        except MlflowException as error:
            self._paused_until = time.monotonic() + RETRY_AFTER_SECONDS
            if not self._reported:
                text = self._store.masked(f"MLflow at {self._store.uri}: {error}")
                print(f"warning: {text}; training continues", file=sys.stderr)
            self._reported = True
