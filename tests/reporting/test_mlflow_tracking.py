"""One MLflow run for each experiment, however often and however many at once are tracked."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from boltlm.errors import UserError
from boltlm.params import flatten_params
from boltlm.reporting import live_logging, mlflow_tracking
from boltlm.reporting.live_logging import live_logger
from boltlm.reporting.mlflow_tracking import TrackingStore
from boltlm.reporting.results import experiment_points, read_results, run_points
from boltlm.timing import timing_path, write_timing
from tests.reporting.experiment import model, report_params, report_settings
from tests.tiny import ROOT

if TYPE_CHECKING:  # at run time only after MLFLOW_DISABLE_TELEMETRY is set
    from mlflow import MlflowClient
    from mlflow.entities import Run

STAGE = ROOT / "stages" / "track.py"
# SQLAlchemy warns about MLflow's own code when MLflow is imported.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

MODELS = {
    "zero": model("teacher/some"),
    "one": model("latents/drawn"),
    "plain": model("split/em", "raw"),
}
PARAMS: dict[str, Any] = report_params(MODELS, {"drawn": "zero"}) | {
    "k_samples": 4,
    "note": "",
    "evaluate": {"k_samples": [1, 2]},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrackingStore:
    """A store whose path contains a space; shared, because creating the database takes seconds."""
    root = tmp_path_factory.mktemp("a root")
    return mlflow_tracking.tracking_store(root / "mlflow.db", root / "mlartifacts")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Each test is an experiment of its own in the shared store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("DVC_EXP_NAME", request.node.name)


def write(root: Path, *, bound: float = -1.25) -> None:
    """The metrics of two iterations; `plain` is not evaluated yet."""
    files = {
        "eval/zero.json": json.dumps({"elbo_per_token": -2.0, "ess_p10": None}),
        "eval/one.json": json.dumps(
            {"elbo_per_token": bound, "questions/standard/raw/accuracy": 0.5}
        ),
        "latents/drawn.json": json.dumps({"ess_mean": 2.5}),
        "train/one.csv": "step,tokens,loss\n10,100,3.5\n20,200,2.5\n",
        "train/plain.csv": "step,tokens,loss\n",
        "figures/report.md": "# Results\n",
    }
    for name, text in files.items():
        path = root / "metrics" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS))


def log(root: Path, store: TrackingStore, params: dict[str, Any] = PARAMS) -> str:
    results = read_results(report_settings(params), root / "metrics", root / "timings")
    record = mlflow_tracking.ExperimentRecord(
        params=flatten_params(params),
        points=experiment_points(results),
        parts=run_points(results),
        files=[root / "params.yaml"],
        folders=[root / "metrics/figures"],
    )
    return mlflow_tracking.log_experiment(record, store)


def client(store: TrackingStore) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store.uri)


def runs(store: TrackingStore, *, deleted: bool = False) -> list["Run"]:
    from mlflow.entities import ViewType

    experiment = client(store).get_experiment_by_name(mlflow_tracking.EXPERIMENT_NAME)
    assert experiment is not None
    view = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY
    return list(client(store).search_runs([experiment.experiment_id], run_view_type=view))


def children(store: TrackingStore, parent: str) -> dict[str, "Run"]:
    return {
        run.info.run_name or "": run
        for run in runs(store)
        if run.data.tags.get(mlflow_tracking.PARENT_TAG) == parent
    }


def history(store: TrackingStore, run: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client(store).get_metric_history(run, metric)]


def test_an_experiment_becomes_a_run_with_a_child_for_each_part(
    tmp_path: Path, store: TrackingStore
) -> None:
    write(tmp_path)
    run_id = log(tmp_path, store)
    run = client(store).get_run(run_id)
    assert run.info.run_name == os.environ["DVC_EXP_NAME"]
    assert run.info.status == "FINISHED"
    assert history(store, run_id, "elbo_per_token") == [(0, -2.0), (1, -1.25)]
    assert run.data.metrics["one/questions/standard/raw/accuracy"] == 0.5
    assert not any("ess_p10" in name for name in run.data.metrics)
    assert run.data.params["evaluate.k_samples"] == "[1, 2]"
    assert run.data.params["note"] == ""
    parts = children(store, run_id)
    assert set(parts) == {"zero", "one", "latents/drawn"}
    assert history(store, parts["one"].info.run_id, "loss") == [(10, 3.5), (20, 2.5)]
    assert parts["latents/drawn"].data.metrics == {"ess_mean": 2.5}
    artifacts = store.artifacts / run_id / "artifacts"
    assert (artifacts / "params.yaml").read_bytes() == (tmp_path / "params.yaml").read_bytes()
    assert (artifacts / "figures" / "report.md").exists()


def test_wall_clock_figures_are_in_the_child_run_at_their_step(
    tmp_path: Path, store: TrackingStore
) -> None:
    write(tmp_path)
    path = timing_path(tmp_path / "timings", "train", "one")
    write_timing(path, tmp_path / "metrics/train/one.csv", [{"step": 20.0, "mfu": 0.25}])
    run_id = log(tmp_path, store)
    assert history(store, children(store, run_id)["one"].info.run_id, "mfu") == [(20, 0.25)]
    assert not any("mfu" in name for name in client(store).get_run(run_id).data.metrics)


@pytest.mark.parametrize("queued", [True, False], ids=["queued", "workspace"])
def test_tracking_twice_adds_nothing(
    tmp_path: Path, store: TrackingStore, monkeypatch: pytest.MonkeyPatch, queued: bool
) -> None:
    if not queued:
        monkeypatch.delenv("DVC_EXP_NAME")
    write(tmp_path)
    first = log(tmp_path, store)
    before = {run.info.run_id: run.data.to_dictionary() for run in runs(store, deleted=True)}
    assert log(tmp_path, store) == first
    after = {run.info.run_id: run.data.to_dictionary() for run in runs(store, deleted=True)}
    assert after == before
    assert len(history(store, first, "elbo_per_token")) == 2


def test_a_changed_number_updates_the_run_and_replaces_its_child(
    tmp_path: Path, store: TrackingStore
) -> None:
    write(tmp_path)
    run_id = log(tmp_path, store)
    before = children(store, run_id)
    write(tmp_path, bound=-1.5)
    assert log(tmp_path, store) == run_id
    after = children(store, run_id)
    assert client(store).get_run(run_id).data.metrics["one/elbo_per_token"] == -1.5
    assert history(store, run_id, "elbo_per_token") == [(0, -2.0), (1, -1.25), (1, -1.5)]
    assert after.keys() == before.keys()
    assert after["zero"].info.run_id == before["zero"].info.run_id
    assert after["one"].data.metrics["elbo_per_token"] == -1.5
    (tmp_path / "metrics/latents/drawn.json").unlink()
    log(tmp_path, store)
    assert children(store, run_id).keys() == {"zero", "one"}


def test_other_params_under_the_same_name_replace_the_run(
    tmp_path: Path, store: TrackingStore
) -> None:
    write(tmp_path)
    first = log(tmp_path, store)
    second = log(tmp_path, store, PARAMS | {"k_samples": 8})
    assert client(store).get_run(second).data.params["k_samples"] == "8"
    assert first not in {run.info.run_id for run in runs(store)}
    assert not children(store, first)


def test_the_workspace_has_one_run_for_each_set_of_params(
    tmp_path: Path, store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_EXP_NAME")
    write(tmp_path)
    other = PARAMS | {"k_samples": 2}
    run_ids = [log(tmp_path, store, params) for params in (PARAMS, other, PARAMS)]
    assert run_ids[0] == run_ids[2] != run_ids[1]


def test_without_any_metrics_the_params_are_logged(tmp_path: Path, store: TrackingStore) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    run_id = log(tmp_path, store)
    assert client(store).get_run(run_id).data.params["k_samples"] == "4"
    assert not client(store).get_run(run_id).data.metrics
    assert not children(store, run_id)


def test_long_values_are_shortened_but_still_identify_the_run(
    tmp_path: Path, store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two params that differ only in what is cut off are two experiments of the workspace."""
    monkeypatch.delenv("DVC_EXP_NAME")
    write(tmp_path)
    run_ids = [log(tmp_path, store, PARAMS | {"note": "x" * 900 + end}) for end in ("", "y")]
    assert run_ids[0] != run_ids[1]
    for run_id in run_ids:
        assert client(store).get_run(run_id).data.params["note"] == "x" * 499 + "…"


def test_a_deleted_mlflow_experiment_is_reported_with_the_remedy(
    tmp_path: Path, store: TrackingStore
) -> None:
    write(tmp_path)
    log(tmp_path, store)
    (experiment_id,) = {run.info.experiment_id for run in runs(store)}
    client(store).delete_experiment(experiment_id)
    with pytest.raises(UserError, match=f"restore --experiment-id {experiment_id}"):
        log(tmp_path, store)
    client(store).restore_experiment(experiment_id)


def test_a_server_that_cannot_be_reached_is_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    write(tmp_path)
    store = mlflow_tracking.tracking_store(tmp_path / "mlflow.db", tmp_path / "mlartifacts")
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9"):
        log(tmp_path, store)


@pytest.fixture
def copies(tmp_path: Path) -> list[Path]:
    """The temporary copies of the repository that DVC makes for two queued experiments."""
    folders = [tmp_path / name for name in ("left", "right")]
    for folder in folders:
        write(folder)
    return folders


def test_two_processes_create_one_mlflow_experiment_in_the_real_repository(
    tmp_path: Path, copies: list[Path]
) -> None:
    root = tmp_path / "repository"
    root.mkdir()
    command = [sys.executable, str(STAGE), "--params", "params.yaml", "--metrics", "metrics"]
    command += ["--timings", "timings", "--figures", "metrics/figures"]
    command += ["--db", "mlflow.db", "--artifacts", "mlartifacts", "--marker", "mlflow.logged"]
    processes = [
        subprocess.Popen(
            command,
            cwd=copy,
            env=os.environ | {"DVC_ROOT": str(root), "DVC_EXP_NAME": copy.name},
            stderr=subprocess.PIPE,
            text=True,
        )
        for copy in copies
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    store = mlflow_tracking.tracking_store(root / "mlflow.db", root / "mlartifacts")
    names = [experiment.name for experiment in client(store).search_experiments()]
    assert names.count(mlflow_tracking.EXPERIMENT_NAME) == 1
    parents = {
        run.info.run_name: run
        for run in runs(store)
        if mlflow_tracking.EXPERIMENT_KEY_TAG in run.data.tags
    }
    assert parents.keys() == {"left", "right"}
    assert len(runs(store)) == 8
    for run in parents.values():
        assert (root / "mlartifacts" / run.info.run_id / "artifacts/params.yaml").exists()
    for copy in copies:
        assert {path.name for path in copy.iterdir()} == {"metrics", "mlflow.logged", "params.yaml"}


def test_a_live_curve_grows_line_by_line_and_is_replaced(
    store: TrackingStore, tmp_path: Path
) -> None:
    """The lines of a running training are in MLflow at once, in a child of the experiment's run;
    once the experiment is tracked there is one child with the complete curve, not two."""
    write(tmp_path)
    log_line = live_logger(flatten_params(PARAMS), "one", store)
    log_line({"step": 10, "tokens": 100, "loss": 3.5})
    log_line({"step": 20, "tokens": 200, "loss": 2.5})
    named = [run for run in runs(store) if run.info.run_name == os.environ["DVC_EXP_NAME"]]
    (parent,) = (run.info.run_id for run in named)
    child = children(store, parent)["one"].info.run_id
    assert history(store, child, "loss") == [(10, 3.5), (20, 2.5)]
    assert log(tmp_path, store) == parent
    assert child not in {run.info.run_id for run in runs(store)}
    tracked = children(store, parent)["one"].info.run_id
    assert history(store, tracked, "loss") == [(10, 3.5), (20, 2.5)]


@pytest.mark.parametrize("pause", [0.0, 1e9], ids=["retried", "paused"])
def test_an_error_of_a_live_curve_is_reported_once_and_the_training_continues(
    store: TrackingStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pause: float,
) -> None:
    """After an error nothing is sent until the pause is over."""
    monkeypatch.setattr(live_logging, "RETRY_AFTER_SECONDS", pause)
    log_line = live_logger(flatten_params(PARAMS), "one", store)
    named = [run for run in runs(store) if run.info.run_name == os.environ["DVC_EXP_NAME"]]
    child = children(store, named[0].info.run_id)["one"].info.run_id
    client(store).delete_run(child)  # MLflow refuses points for a deleted run
    sent: list[int] = []
    log_points = live_logging.log_points

    def counted(*arguments: Any) -> None:
        sent.append(1)
        log_points(*arguments)

    monkeypatch.setattr(live_logging, "log_points", counted)
    for _ in range(3):
        log_line({"step": 30, "loss": 1.0})
    assert capsys.readouterr().err.count("training continues") == 1
    assert len(sent) == (1 if pause else 3)
