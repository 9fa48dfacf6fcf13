"""One MLflow run for each experiment, however often and however many at once are tracked."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from boltlm.errors import UserError
from boltlm.params import flatten_params
from boltlm.reporting import live_logging, mlflow_store, mlflow_tracking, mlflow_ui
from boltlm.reporting.experiment_identity import FACTS_FILE, Preset, nearest_preset
from boltlm.reporting.experiment_record import TrackedFiles, experiment_record
from boltlm.reporting.live_logging import live_logger
from boltlm.reporting.mlflow_store import TrackingServerError, TrackingStore
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
    return mlflow_store.tracking_store(root / "mlflow.db", root / "mlartifacts")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Each test is an experiment of its own in the shared store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("DVC_EXP_NAME", request.node.name)


LOCK = {
    "stages": {
        "split": {
            "deps": [{"path": "src/boltlm/tokens.py", "md5": "0"}],
            "params": {"params.yaml": {"corpora": {}}},
            "outs": [{"path": "data/split", "md5": "1.dir"}],
        },
        "teacher@some": {
            "params": {"params.yaml": {"teachers.some": {}}},
            "outs": [{"path": "data/teacher/some", "md5": "2.dir"}],
        },
        "train@one": {
            "deps": [
                {"path": "models/base", "md5": "3.dir"},
                {"path": "data/split/em", "md5": "4.dir"},
                {"path": "data/teacher/some", "md5": "2.dir"},
            ],
            "params": {"params.yaml": {"train": {}, "k_samples": 4, "models.one": {}}},
            "outs": [{"path": "models/one", "md5": "5.dir"}],
        },
        "train@of_another_preset": {"params": {"params.yaml": {"note": ""}}, "outs": []},
    }
}
FACTS = {
    "summary": ["It works."],
    "warnings": ["Few seeds."],
    "versions": {"machine": "Linux, 2 CPU cores"},
}
PRESET = Preset("small", {"k_samples": "4"})


def write(root: Path, *, bound: float = -1.25) -> None:
    """The metrics of two iterations; `plain` is not evaluated yet."""
    files = {
        "metrics/eval/zero.json": json.dumps({"elbo_per_token": -2.0, "ess_p10": None}),
        "metrics/eval/one.json": json.dumps(
            {"elbo_per_token": bound, "questions/standard/raw/accuracy": 0.5}
        ),
        "metrics/latents/drawn.json": json.dumps({"ess_mean": 2.5}),
        "metrics/teacher/some.json": json.dumps({"cost_usd": 1.25}),
        "metrics/train/one.csv": "step,tokens,loss\n10,100,3.5\n20,200,2.5\n",
        "metrics/train/plain.csv": "step,tokens,loss\n",
        "metrics/figures/report.md": "# Results\n",
        "reports/x/index.html": "<p>page</p>",
        f"reports/x/{FACTS_FILE}": json.dumps(FACTS),
        "dvc.lock": yaml.safe_dump(LOCK),
        "params.yaml": yaml.safe_dump(PARAMS),
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def log(root: Path, store: TrackingStore, params: dict[str, Any] = PARAMS) -> str:
    metrics, page = root / "metrics", root / "reports/x/index.html"
    inputs = root / "params.yaml", metrics, metrics / "figures", root / "timings"
    files = TrackedFiles(*inputs, root / "dvc.lock", page)
    record = experiment_record(report_settings(params), flatten_params(params), PRESET, files)
    return mlflow_tracking.log_experiment(record, store)


def client(store: TrackingStore) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store.uri)


def runs(store: TrackingStore, *, deleted: bool = False) -> list["Run"]:
    from mlflow.entities import ViewType

    experiment = client(store).get_experiment_by_name(mlflow_store.EXPERIMENT_NAME)
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


def data_sets(run: "Run") -> dict[str, str]:
    """The digests of the data sets that a run names as inputs."""
    assert run.inputs is not None
    return {item.dataset.name: item.dataset.digest for item in run.inputs.dataset_inputs}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, store: TrackingStore) -> tuple[Path, str]:
    """An experiment that was logged once, and the id of its run."""
    root = tmp_path_factory.mktemp("logged")
    write(root)
    path = timing_path(root / "timings", "train", "one")
    lines = [{"step": 20.0, "mfu": 0.25, "seconds": 40.0}]
    write_timing(path, root / "metrics/train/one.csv", lines)
    os.utime(path, (1_000_000, 1_000_000))
    for file in (root / "metrics").rglob("*.*"):
        os.utime(file, (1_000_100, 1_000_100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_EXP_NAME", "logged")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        (root / "timings").joinpath("workspace").rename(root / "timings" / "logged")
        return root, log(root, store)


def test_the_run_of_an_experiment_says_what_it_is_and_how_it_went(
    logged: tuple[Path, str], store: TrackingStore
) -> None:
    root, run_id = logged
    run = client(store).get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("small, k_samples=4", "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (999_960_000, 1_000_100_000)
    assert history(store, run_id, "elbo") == [(0, -2.0), (1, -1.25)]
    assert len(run.data.metrics) <= 15
    tags = run.data.tags
    assert (tags["preset"], tags["changed.k_samples"]) == ("small", "4")
    assert (tags["dvc_experiment"], tags["hardware"]) == ("logged", "Linux, 2 CPU cores")
    assert (tags["wall_time"], tags["teacher_cost"]) == (
        "40 s of training and E-steps",
        "1.25 US dollars",
    )
    assert tags["git_commit"]
    assert tags["dvc_lock"]
    description = tags[mlflow_tracking.DESCRIPTION_TAG]
    assert description.splitlines() == ["1. It works.", "", "**Warnings**", "", "- Few seeds."]
    inputs = data_sets(run)
    assert inputs == {"data/split": "1.dir", "data/teacher/some": "2.dir"}
    artifacts = store.artifacts / run_id / "artifacts"
    assert (artifacts / "params.yaml").read_bytes() == (root / "params.yaml").read_bytes()
    assert (artifacts / "figures" / "report.md").exists()
    assert (artifacts / "report" / "index.html").read_text() == "<p>page</p>"


def test_only_params_that_stages_use_are_logged(
    logged: tuple[Path, str], store: TrackingStore
) -> None:
    """Those of the parts are with the parts, and those of another preset's stages nowhere."""
    params = client(store).get_run(logged[1]).data.params
    assert params["k_samples"] == "4"
    assert params["train.schedule.kind"] == "cosine"
    assert params["teachers.some.kind"] == "dataset"
    assert not {"note", "evaluate.k_samples", "models.one.data"} & params.keys()
    own = children(store, logged[1])["one"].data.params
    assert own["data"] == "latents/drawn"
    assert own["budget.kind"] == "epochs", "a default of the section is filled in"


def test_each_part_has_a_child_run_with_its_curve_and_its_time(
    logged: tuple[Path, str], store: TrackingStore
) -> None:
    parts = children(store, logged[1])
    assert set(parts) == {"zero", "one", "latents/drawn"}
    one = parts["one"]
    assert history(store, one.info.run_id, "loss") == [(10, 3.5), (20, 2.5)]
    assert history(store, one.info.run_id, "mfu") == [(20, 0.25)]
    assert one.data.metrics["questions/standard/raw/accuracy"] == 0.5
    assert (one.info.start_time, one.info.end_time) == (999_960_000, 1_000_000_000)
    inputs = data_sets(one)
    assert inputs.keys() == {"data/split/em", "data/teacher/some"}, "no code, no models"
    assert parts["latents/drawn"].data.metrics == {"ess_mean": 2.5}
    assert parts["latents/drawn"].data.params["k_samples"] == "4", "null: that of the experiment"


def test_logging_again_adds_nothing(
    logged: tuple[Path, str], store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage always runs; also after a commit, which changes a tag only."""
    monkeypatch.setenv("DVC_EXP_NAME", "logged")
    before = {run.info.run_id: run.data.to_dictionary() for run in runs(store, deleted=True)}
    assert log(logged[0], store) == logged[1]
    after = {run.info.run_id: run.data.to_dictionary() for run in runs(store, deleted=True)}
    assert after == before


def test_a_changed_number_replaces_the_run_and_other_params_make_another(
    tmp_path: Path, store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the workspace, where an experiment has no name, it is known by its params."""
    monkeypatch.delenv("DVC_EXP_NAME")
    write(tmp_path)
    first = log(tmp_path, store)
    write(tmp_path, bound=-1.5)
    second = log(tmp_path, store)
    assert history(store, second, "elbo") == [(0, -2.0), (1, -1.5)]
    assert first not in {run.info.run_id for run in runs(store)}
    assert not children(store, first)
    third = log(tmp_path, store, PARAMS | {"note": "x" * 900})
    assert {second, third} <= {run.info.run_id for run in runs(store)}


def test_without_metrics_lock_and_page_all_params_are_logged(
    tmp_path: Path, store: TrackingStore
) -> None:
    """Long values are shortened: params.yaml is an artifact."""
    params = PARAMS | {"note": "x" * 900}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    run_id = log(tmp_path, store, params)
    run = client(store).get_run(run_id)
    assert run.data.params["note"] == "x" * 499 + "…"
    assert run.data.params["evaluate.k_samples"] == "[1, 2]"
    assert not run.data.metrics
    assert not children(store, run_id)


def test_a_deleted_mlflow_experiment_is_reported_with_the_remedy(
    logged: tuple[Path, str], store: TrackingStore
) -> None:
    experiment_id = client(store).get_run(logged[1]).info.experiment_id
    client(store).delete_experiment(experiment_id)
    with pytest.raises(UserError, match=f"restore --experiment-id {experiment_id}"):
        log(logged[0], store)
    client(store).restore_experiment(experiment_id)


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    """With what SQLite says, without its traceback; the lock leaves no file."""
    (tmp_path / "mlflow.db").write_bytes(b"damaged" * 1000)
    damaged = mlflow_store.tracking_store(tmp_path / "mlflow.db", tmp_path / "mlartifacts")
    message = r"mlflow\.db: file is not a database; if it is damaged, move it away and run dvc"
    with pytest.raises(UserError, match=message), mlflow_store.mlflow_client(damaged) as client:
        client.search_experiments()
    assert not (tmp_path / "mlflow.db.lock").exists()


class Refusing(BaseHTTPRequestHandler):
    """A tracking server that is alive, and refuses every other request."""

    def do_GET(self) -> None:
        body = b"no"
        self.send_response(200 if self.path == "/health" else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not reported."""


@pytest.fixture(params=["dead", "silent", "refusing"])
def broken_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The host and port of a server that nothing listens at, that accepts connections and never
    answers, or that refuses what it is asked."""
    if request.param == "refusing":
        with HTTPServer(("127.0.0.1", 0), Refusing) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"127.0.0.1:{server.server_port}"
            server.shutdown()
        return
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if request.param == "silent":
            listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_a_broken_server_costs_a_warning(
    broken_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The stage `track` catches the error; a training goes on unlogged. No password is printed."""
    monkeypatch.setattr(mlflow_store, "PROBE_SECONDS", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:s%40cret@{broken_server}")
    write(tmp_path)
    store = mlflow_store.tracking_store(tmp_path / "mlflow.db", tmp_path / "mlartifacts")
    with pytest.raises(TrackingServerError, match=r"MLflow at http://me:\*\*\*@127") as caught:
        log(tmp_path, store)
    assert live_logger(flatten_params(PARAMS), "one", store) is None
    warning = capsys.readouterr().err
    assert warning.count("warning: MLflow at") == 1
    for secret in ("s%40cret", "s@cret"):
        assert secret not in warning + str(caught.value)


def test_the_stage_ends_without_error_when_the_server_is_dead(tmp_path: Path) -> None:
    write(tmp_path)
    environment = os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    done = subprocess.run(COMMAND, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("warning: MLflow at http://127.0.0.1:9 does not answer")


COMMAND = [sys.executable, str(STAGE), "--params", "params.yaml", "--presets", "presets"]
COMMAND += ["--metrics", "metrics", "--figures", "metrics/figures", "--timings", "timings"]
COMMAND += ["--lock", "dvc.lock", "--reports", "reports", "--db", "mlflow.db"]
COMMAND += ["--artifacts", "mlartifacts"]


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
    processes = [
        subprocess.Popen(
            COMMAND,
            cwd=copy,
            env=os.environ | {"DVC_ROOT": str(root), "DVC_EXP_NAME": copy.name},
            stderr=subprocess.PIPE,
            text=True,
        )
        for copy in copies
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    store = mlflow_store.tracking_store(root / "mlflow.db", root / "mlartifacts")
    names = [experiment.name for experiment in client(store).search_experiments()]
    assert names.count(mlflow_store.EXPERIMENT_NAME) == 1
    parents = {
        run.data.tags["dvc_experiment"]: run
        for run in runs(store)
        if mlflow_tracking.EXPERIMENT_KEY_TAG in run.data.tags
    }
    assert parents.keys() == {"left", "right"}
    assert len(runs(store)) == 8
    for run in parents.values():
        assert (root / "mlartifacts" / run.info.run_id / "artifacts/params.yaml").exists()
    for copy in copies:
        assert not list(copy.glob("ml*")), "nothing is logged to the copy"


def test_a_live_curve_grows_line_by_line_and_is_replaced(
    store: TrackingStore, tmp_path: Path
) -> None:
    """The lines of a running training are in MLflow at once, in a child of a run of its experiment;
    once the experiment is tracked, there is one run with the complete curve, not two. A training
    that runs again makes the experiment's run incomplete, so that it is logged anew."""
    write(tmp_path)
    log_line = live_logger(flatten_params(PARAMS), "one", store)
    assert log_line is not None
    log_line({"step": 10, "tokens": 100, "loss": 3.5})
    log_line({"step": 20, "tokens": 200, "loss": 2.5})
    (parent,) = (run for run in runs(store) if run.info.run_name == os.environ["DVC_EXP_NAME"])
    child = children(store, parent.info.run_id)["one"].info.run_id
    assert history(store, child, "loss") == [(10, 3.5), (20, 2.5)]
    first = log(tmp_path, store)
    assert not {child, parent.info.run_id} & {run.info.run_id for run in runs(store)}
    live_logger(flatten_params(PARAMS), "one", store)
    second = log(tmp_path, store)
    assert second != first
    tracked = children(store, second)["one"].info.run_id
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
    assert log_line is not None
    (parent,) = (run for run in runs(store) if run.info.run_name == os.environ["DVC_EXP_NAME"])
    child = children(store, parent.info.run_id)["one"].info.run_id
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


def test_a_run_is_named_after_the_nearest_preset_and_its_overrides() -> None:
    presets = {"smoke": {"k": "2", "n": "10"}, "default": {"k": "4", "n": "1000"}}
    assert nearest_preset({"k": "4", "n": "1000"}, presets).run_name == "default"
    assert nearest_preset({"k": "8", "n": "1000"}, presets).run_name == "default, k=8"
    assert nearest_preset({"k": "2", "n": "10", "s": "1"}, presets).run_name == "smoke, s=1"
    removed = nearest_preset({"n": "10"}, presets)
    assert removed.run_name == "smoke, k=(removed)"
    many = {str(number): "1" for number in range(9)}
    assert nearest_preset({"k": "4", "n": "1000", **many}, presets).run_name == "default, 9 changes"


def test_the_browser_shows_the_runs_in_the_view_of_model_training(
    logged: tuple[Path, str],
    store: TrackingStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """MLflow is served to this machine only, without the processes of its job executor, and ends
    with Ctrl-C."""
    started: list[tuple[list[str], dict[str, str]]] = []

    class Server:
        """Stands for the process of MLflow's server, until Ctrl-C."""

        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            started.append((command, env))
            self.running = True

        def poll(self) -> None:
            return None

        def wait(self) -> int:
            if self.running:
                raise KeyboardInterrupt
            return 0

        def terminate(self) -> None:
            self.running = False

    opened: list[str] = []
    monkeypatch.setattr(mlflow_ui.subprocess, "Popen", Server)
    monkeypatch.setattr(mlflow_ui.requests, "get", lambda *_, **__: None)
    monkeypatch.setattr(mlflow_ui.webbrowser, "open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    mlflow_ui.open_ui(store, 0)
    ((command, environment),) = started
    port = command[command.index("--port") + 1]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--backend-store-uri") + 1] == store.uri
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    experiment = client(store).get_run(logged[1]).info.experiment_id
    address = f"http://127.0.0.1:{port}/#/experiments/{experiment}/runs"
    assert opened == [f"{address}?workflowType=machine_learning"]
    assert opened[0] in capsys.readouterr().out


def test_a_port_in_use_is_a_user_error(store: TrackingStore) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with pytest.raises(UserError, match="cannot be used"):
            mlflow_ui.open_ui(store, listening.getsockname()[1])
