"""One MLflow run an experiment, however often and however many at once are tracked."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from boltlm import tracking
from boltlm.errors import UserError
from boltlm.figures.results import parts, points, read

if TYPE_CHECKING:  # at run time only after MLFLOW_DISABLE_TELEMETRY is set
    from mlflow import MlflowClient
    from mlflow.entities import Run

STAGE = Path(__file__).parents[1] / "stages" / "track.py"
# SQLAlchemy's warning about MLflow's own code, at MLflow's import.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")

PARAMS: dict[str, Any] = {
    "k_samples": 4,
    "note": "",
    "latents": {"drawn": {"model": "zero", "corpus": "em"}},
    "finetune": {"runs": {}},
    "models": {
        "zero": {"parent": "start", "data": "teacher/some", "format": "latent"},
        "one": {"parent": "start", "data": "latents/drawn", "format": "latent"},
        "plain": {"parent": "start", "data": "split/em", "format": "raw", "sizes": [1, 2]},
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tracking.Store:
    """A store whose path has a blank; made once, for making the database takes seconds."""
    root = tmp_path_factory.mktemp("a root")
    return tracking.store(root / "mlflow.db", root / "mlartifacts")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Each test is an experiment of its own in the common store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("DVC_EXP_NAME", request.node.name)


def write(root: Path, *, bound: float = -1.25) -> None:
    """The metrics of the two iterations; `plain` is not measured yet."""
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


def log(root: Path, place: tracking.Store, params: dict[str, Any] | None = None) -> str:
    results = read(params or PARAMS, root / "metrics")
    experiment = tracking.Experiment(
        params=params or PARAMS,
        points=points(results),
        parts=parts(results),
        files=[root / "params.yaml"],
        folders=[root / "metrics/figures"],
    )
    return tracking.log(experiment, place)


def client(place: tracking.Store) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=place.uri)


def runs(place: tracking.Store, *, deleted: bool = False) -> list["Run"]:
    from mlflow.entities import ViewType

    found = client(place).get_experiment_by_name(tracking.EXPERIMENT)
    assert found is not None
    view = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY
    return list(client(place).search_runs([found.experiment_id], run_view_type=view))


def children(place: tracking.Store, parent: str) -> dict[str, "Run"]:
    return {
        run.info.run_name or "": run
        for run in runs(place)
        if run.data.tags.get(tracking.PARENT) == parent
    }


def history(place: tracking.Store, run: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client(place).get_metric_history(run, metric)]


def test_an_experiment_becomes_a_run_with_a_child_for_each_part(
    tmp_path: Path, place: tracking.Store
) -> None:
    write(tmp_path)
    run = log(tmp_path, place)
    found = client(place).get_run(run)
    assert found.info.run_name == os.environ["DVC_EXP_NAME"]
    assert found.info.status == "FINISHED"
    assert history(place, run, "elbo_per_token") == [(0, -2.0), (1, -1.25)]
    assert found.data.metrics["one/questions/standard/raw/accuracy"] == 0.5
    assert not any("ess_p10" in name for name in found.data.metrics)
    assert found.data.params["models.plain.sizes"] == "[1, 2]"
    assert found.data.params["note"] == ""
    below = children(place, run)
    assert set(below) == {"zero", "one", "latents/drawn"}
    assert history(place, below["one"].info.run_id, "loss") == [(10, 3.5), (20, 2.5)]
    assert below["latents/drawn"].data.metrics == {"ess_mean": 2.5}
    artifacts = place.artifacts / run / "artifacts"
    assert (artifacts / "params.yaml").read_bytes() == (tmp_path / "params.yaml").read_bytes()
    assert (artifacts / "figures" / "report.md").exists()


@pytest.mark.parametrize("named", [True, False], ids=["queued", "workspace"])
def test_tracking_twice_adds_nothing(
    tmp_path: Path, place: tracking.Store, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    if not named:
        monkeypatch.delenv("DVC_EXP_NAME")
    write(tmp_path)
    first = log(tmp_path, place)
    before = {run.info.run_id: run.data.to_dictionary() for run in runs(place, deleted=True)}
    assert log(tmp_path, place) == first
    after = {run.info.run_id: run.data.to_dictionary() for run in runs(place, deleted=True)}
    assert after == before
    assert len(history(place, first, "elbo_per_token")) == 2


def test_a_changed_number_updates_the_run_and_replaces_its_child(
    tmp_path: Path, place: tracking.Store
) -> None:
    write(tmp_path)
    run = log(tmp_path, place)
    before = children(place, run)
    write(tmp_path, bound=-1.5)
    assert log(tmp_path, place) == run
    after = children(place, run)
    assert client(place).get_run(run).data.metrics["one/elbo_per_token"] == -1.5
    assert history(place, run, "elbo_per_token") == [(0, -2.0), (1, -1.25), (1, -1.5)]
    assert after.keys() == before.keys()
    assert after["zero"].info.run_id == before["zero"].info.run_id
    assert after["one"].data.metrics["elbo_per_token"] == -1.5
    (tmp_path / "metrics/latents/drawn.json").unlink()
    log(tmp_path, place)
    assert children(place, run).keys() == {"zero", "one"}


def test_other_params_under_the_same_name_replace_the_run(
    tmp_path: Path, place: tracking.Store
) -> None:
    write(tmp_path)
    first = log(tmp_path, place)
    second = log(tmp_path, place, PARAMS | {"k_samples": 8})
    assert client(place).get_run(second).data.params["k_samples"] == "8"
    assert first not in {run.info.run_id for run in runs(place)}
    assert not children(place, first)


def test_the_workspace_has_a_run_for_each_params(
    tmp_path: Path, place: tracking.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_EXP_NAME")
    write(tmp_path)
    other = PARAMS | {"k_samples": 2}
    ids = [log(tmp_path, place, params) for params in (PARAMS, other, PARAMS)]
    assert ids[0] == ids[2] != ids[1]


def test_without_any_metrics_the_params_are_there(tmp_path: Path, place: tracking.Store) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    run = log(tmp_path, place)
    assert client(place).get_run(run).data.params["k_samples"] == "4"
    assert not client(place).get_run(run).data.metrics
    assert not children(place, run)


def test_long_values_end_in_an_ellipsis() -> None:
    found = tracking.flatten({"a": {"b": "x" * 900, "c": []}, "d": {}})
    assert found == {"a.b": "x" * 499 + "…", "a.c": "[]", "d": "{}"}


def test_a_deleted_experiment_is_told_with_its_remedy(
    tmp_path: Path, place: tracking.Store
) -> None:
    write(tmp_path)
    log(tmp_path, place)
    (found,) = {run.info.experiment_id for run in runs(place)}
    client(place).delete_experiment(found)
    with pytest.raises(UserError, match=f"restore --experiment-id {found}"):
        log(tmp_path, place)
    client(place).restore_experiment(found)


def test_a_server_that_is_not_there_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    write(tmp_path)
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9"):
        log(tmp_path, tracking.store(tmp_path / "mlflow.db", tmp_path / "mlartifacts"))


@pytest.fixture
def copies(tmp_path: Path) -> list[Path]:
    """The temporary copies of the repository that DVC makes for two queued experiments."""
    made = [tmp_path / name for name in ("left", "right")]
    for copy in made:
        write(copy)
    return made


def test_two_at_once_make_one_experiment_in_the_real_repository(
    tmp_path: Path, copies: list[Path]
) -> None:
    root = tmp_path / "repository"
    root.mkdir()
    command = [sys.executable, str(STAGE), "--params", "params.yaml", "--metrics", "metrics"]
    command += ["--figures", "metrics/figures", "--db", "mlflow.db", "--artifacts", "mlartifacts"]
    started = [
        subprocess.Popen(
            command,
            cwd=copy,
            env=os.environ | {"DVC_ROOT": str(root), "DVC_EXP_NAME": copy.name},
            stderr=subprocess.PIPE,
            text=True,
        )
        for copy in copies
    ]
    errors = [process.communicate(timeout=200)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    place = tracking.store(root / "mlflow.db", root / "mlartifacts")
    names = [found.name for found in client(place).search_experiments()]
    assert names.count(tracking.EXPERIMENT) == 1
    parents = {run.info.run_name: run for run in runs(place) if tracking.KEY in run.data.tags}
    assert parents.keys() == {"left", "right"}
    assert len(runs(place)) == 8
    for run in parents.values():
        assert (root / "mlartifacts" / run.info.run_id / "artifacts/params.yaml").exists()
    for copy in copies:
        assert {path.name for path in copy.iterdir()} == {"metrics", "params.yaml"}


def test_a_curve_grows_line_by_line_and_is_replaced(
    place: tracking.Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a training says as it goes is in MLflow at once, in a child of the experiment's run;
    when all is tracked there is one child with the whole curve, not two."""
    write(tmp_path)
    tell = tracking.live(PARAMS, "one", place)
    tell({"step": 10, "tokens": 100, "loss": 3.5})
    tell({"step": 20, "tokens": 200, "loss": 2.5})
    named = [run for run in runs(place) if run.info.run_name == os.environ["DVC_EXP_NAME"]]
    (parent,) = (run.info.run_id for run in named)
    child = children(place, parent)["one"].info.run_id
    assert history(place, child, "loss") == [(10, 3.5), (20, 2.5)]
    assert log(tmp_path, place) == parent
    assert child not in {run.info.run_id for run in runs(place)}
    assert history(place, children(place, parent)["one"].info.run_id, "loss") == [
        (10, 3.5),
        (20, 2.5),
    ]
    for _ in range(3):
        tell({"step": 30, "loss": 1.0})  # the run is gone: said once, the training goes on
    assert capsys.readouterr().err.count("the run goes on") == 1
