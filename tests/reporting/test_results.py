"""The points that MLflow gets, and the wall-clock figures among them."""

from pathlib import Path

import pytest

from boltlm.reporting.headline import headline_points
from boltlm.reporting.report import write_report
from boltlm.reporting.results import Results, read_results, run_points
from boltlm.timing import timing_path, write_timing
from tests.reporting.experiment import chain_params, report_settings, write_metrics

CHAIN = ("first", "second")
SETTINGS = report_settings(chain_params(CHAIN))


@pytest.fixture(autouse=True)
def _workspace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    write_metrics(chain_params(CHAIN), tmp_path)


@pytest.fixture
def timings(tmp_path: Path) -> Path:
    """Wall-clock figures of the model `second` and of the latents that it is trained on."""
    folder, metrics = tmp_path / "timings", tmp_path / "metrics"
    lines = [{"step": 1.0, "seconds": 2.5}, {"step": 3.0, "seconds": 7.5}]
    curve, diagnostics = metrics / "train/second.csv", metrics / "latents/by_first.json"
    write_timing(timing_path(folder, "train", "second"), curve, lines)
    path = timing_path(folder, "latents", "by_first")
    write_timing(path, diagnostics, [{"scored_tokens_per_second": 100.0}])
    return folder


def results_of(root: Path, timings: Path | None = None) -> Results:
    return read_results(SETTINGS, root / "metrics", timings)


def test_fine_tuning_metrics_belong_to_a_part(tmp_path: Path) -> None:
    results = results_of(tmp_path)
    assert ("gsm8k/standard/latent/accuracy", 0.25, 0) in run_points(results)["finetune/tuned"]


def test_wall_clock_figures_are_points_of_their_part(tmp_path: Path, timings: Path) -> None:
    """A training's at the steps of its curve; those of latents at step 0. The experiment's own
    points, the figures and the report hold none of them."""
    without, results = results_of(tmp_path), results_of(tmp_path, timings)
    points, plain = run_points(results), run_points(without)
    added = {part: set(points[part]) - set(plain[part]) for part in points}
    assert {part: new for part, new in added.items() if new} == {
        "second": {("seconds", 2.5, 1), ("seconds", 7.5, 3)},
        "latents/by_first": {("scored_tokens_per_second", 100.0, 0)},
    }
    assert headline_points(results) == headline_points(without)
    write_report(SETTINGS, metrics=tmp_path / "metrics", out=tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert b"tokens_per_second" not in path.read_bytes()


def test_wall_clock_figures_of_another_run_are_ignored(tmp_path: Path, timings: Path) -> None:
    """After DVC has restored other metrics, the timing files no longer belong to them."""
    curve = tmp_path / "metrics/train/second.csv"
    curve.write_text(curve.read_text().replace("0.1", "0.2"))
    points = run_points(results_of(tmp_path, timings))
    assert not [point for point in points["second"] if point.metric == "seconds"]
    assert ("scored_tokens_per_second", 100.0, 0) in points["latents/by_first"]
