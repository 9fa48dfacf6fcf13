"""The stage `curves`: equal to the evaluation of each snapshot, resumed, and summarised."""

import contextlib
import json
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from boltlm import checkpoint
from boltlm.errors import UserError
from boltlm.evaluation import run, snapshot_curves
from boltlm.evaluation.config import CurveSettings, EvaluateSettings
from boltlm.evaluation.curve_points import (
    CurvePoint,
    metric_direction,
    read_curves,
    summarize_curves,
    write_curves,
)
from boltlm.evaluation.run import EvaluationPaths
from boltlm.evaluation.snapshot_curves import CurvePaths, measure_curves
from boltlm.params import build_settings
from boltlm.shard_store import exclusive_lock
from tests import tiny
from tests.evaluation.test_run import Stage

STEPS = (10, 20, 25)
ENTRY: dict[str, Any] = {"likelihood": True, "documents": None, "evaluate": {}}


class CurveStage(Stage):
    """Three snapshots of a training, the weights of which are further and further from the start;
    `curves` has an entry for a latent model and one for a raw model."""

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        self.params["evaluate"] |= {"large_k": None, "extra_corpora": [], "k_samples": [1, 2]}
        self.params["evaluate"] |= {"tasks": ["questions/standard/latent"], "limit": 4}
        self.params["curves"] = {"one": ENTRY}
        self.curve_paths = CurvePaths(
            folder / "snapshots",
            self.paths.split,
            self.paths.chunks,
            tiny.FEWSHOT,
            folder / "work",
        )
        for step in STEPS:
            snapshot = self.curve_paths.snapshots / f"step-{step:09}"
            weights = checkpoint.load_model(model)
            with torch.no_grad():
                weights.lm_head.weight.mul_(1 + step)  # pyright: ignore
            facts = {"steps": step, "tokens": 100 * step, "raw_tokens_seen": 70 * step}
            checkpoint.save_model(weights, snapshot, model, facts)

    def measure(self, name: str = "one", **entry: Any) -> list[CurvePoint]:
        params = {**self.params, "curves": {name: {**ENTRY, **entry}}}
        settings = build_settings(CurveSettings, params, name=name)
        return measure_curves(settings, self.curve_paths)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> CurveStage:
    return CurveStage(tmp_path_factory.mktemp("curves"), base_folder)


@pytest.fixture(scope="module")
def points(stage: CurveStage) -> list[CurvePoint]:
    return stage.measure()


def values_of(points: list[CurvePoint], step: int) -> dict[str, float | None]:
    values = {point.metric: point.value for point in points if point.step == step}
    errors = {f"{p.metric}_se": p.se for p in points if p.step == step and p.se is not None}
    return values | errors


def test_a_point_is_the_evaluation_of_its_snapshot(
    stage: CurveStage, points: list[CurvePoint], tmp_path: Path
) -> None:
    """Every metric and standard error equals that of the stage `evaluate`, run on the snapshot as
    on any model, without the work of this stage."""
    settings = build_settings(EvaluateSettings, stage.params, name="one")
    assert sorted({point.step for point in points}) == list(STEPS)
    for step in (10, 25):
        snapshot = stage.curve_paths.snapshots / f"step-{step:09}"
        paths = EvaluationPaths(
            snapshot,
            stage.paths.split,
            stage.paths.chunks,
            tiny.FEWSHOT,
            tmp_path / "work",
            tmp_path / "out",
        )
        expected = {
            name: value
            for name, value in run.evaluate_model(settings, paths).items()
            if value == value
        }
        measured = {name: v for name, v in values_of(points, step).items() if v is not None}
        assert measured == expected
        assert {"elbo_per_token_se", "nll_per_token"} < measured.keys()
        assert "questions/standard/latent/accuracy" in measured
    assert {(p.step, p.tokens, p.raw_tokens) for p in points} == {
        (s, 100 * s, 70 * s) for s in STEPS
    }
    nlls = [p.value for p in points if p.metric == "nll_per_token"]
    assert len(set(nlls)) == 3


def test_a_finished_snapshot_is_not_evaluated_again(
    base_folder: Path, tmp_path: Path, points: list[CurvePoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the second snapshot, then run again: the first one's results are used. A
    snapshot more, as of a training that ran on, adds one evaluation."""
    stage = CurveStage(tmp_path, base_folder)
    evaluated: list[str] = []
    evaluate_model = run.evaluate_model

    def interrupted_once(settings: Any, paths: Any, **options: Any) -> dict[str, float]:
        evaluated.append(paths.model.name)
        metrics = evaluate_model(settings, paths, **options)
        if len(evaluated) == 2:
            raise InterruptedError
        return metrics

    monkeypatch.setattr(snapshot_curves, "evaluate_model", interrupted_once)
    with pytest.raises(InterruptedError):
        stage.measure()
    assert stage.measure() == points
    folders = [f"step-{step:09}" for step in STEPS]
    assert evaluated == [*folders[:2], *folders[1:]]
    last = stage.curve_paths.snapshots / folders[-1]
    more = last.with_name("step-000000030")
    shutil.copytree(last, more)
    facts = json.loads((more / "training.json").read_text())
    (more / "training.json").write_text(json.dumps({**facts, "steps": 30}))
    assert [p for p in stage.measure() if p.step <= 25] == points
    assert evaluated[4:] == ["step-000000030"]
    assert not list((tmp_path / "work" / "curves").glob("*.tables"))


def test_an_entry_changes_the_section_evaluate(stage: CurveStage) -> None:
    """The first documents only, another K, no task: and the documents are those of the whole."""
    entry = {"documents": 4, "evaluate": {"tasks": [], "k_samples": [1]}}
    points = stage.measure(**entry)
    values = values_of(points, 10)
    assert values["heldout_documents"] == 4
    assert not any(name.startswith("questions/") for name in values)
    assert "elbo_per_token_k1" in values
    assert "elbo_per_token_k2" not in values


def test_tasks_without_likelihood(stage: CurveStage, points: list[CurvePoint]) -> None:
    """The accuracies are those of an entry with both."""
    alone = stage.measure(likelihood=False)
    assert {point.metric.partition("/")[0] for point in alone} == {"questions"}
    assert alone == [point for point in points if point.metric.startswith("questions/")]


def test_a_raw_model_has_no_bound(stage: CurveStage) -> None:
    """Its curve is that of its likelihoods."""
    values = values_of(stage.measure("raw", documents=2), 20)
    assert "nll_per_token" in values
    assert "elbo_per_token" not in values


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("one", {"documents": 0}, "curves.one.documents must be 1 or more"),
        ("one", {"evaluate": {"tasks": ["gsm8k/standard/raw"]}}, "no key benchmarks.gsm8k"),
        ("one", {"evaluate": {"ks": [1]}}, "unknown key curves.one.evaluate.ks"),
        ("none", {}, "no key 'models.none'"),
        ("one", {"likelihood": False, "evaluate": {"tasks": []}}, "there is nothing to measure"),
        ("raw", {"likelihood": False}, "is for a model of the format raw"),
    ],
)
def test_invalid_entries(name: str, entry: dict[str, Any], message: str, stage: CurveStage) -> None:
    """An error that names the key."""
    with pytest.raises(UserError, match=re.escape(message)):
        stage.measure(name, **entry)


def test_a_model_without_snapshots_is_an_error(stage: CurveStage, tmp_path: Path) -> None:
    """The message says which key to set."""
    paths = replace(stage.curve_paths, snapshots=tmp_path)
    settings = build_settings(CurveSettings, stage.params, name="one")
    with pytest.raises(UserError, match=r"no snapshots in it; set models\.one\.train\.snapshots"):
        measure_curves(settings, paths)


def with_workers(stage: CurveStage, count: int, **sampling: Any) -> CurveSettings:
    """Small evaluations, without tasks, by this many workers."""
    entry = {**ENTRY, "documents": 2, "evaluate": {"tasks": [], "k_samples": [1]}}
    changes = {"workers": count, "threads": 1, **sampling}
    params = {**stage.params, "sampling": {**stage.params["sampling"], **changes}}
    return build_settings(CurveSettings, {**params, "curves": {"one": entry}}, name="one")


def first_snapshots(stage: CurveStage, count: int, folder: Path) -> CurvePaths:
    """The paths with the first snapshots alone, and an empty work folder."""
    for snapshot in sorted(stage.curve_paths.snapshots.iterdir())[:count]:
        shutil.copytree(snapshot, folder / "snapshots" / snapshot.name)
    return replace(stage.curve_paths, snapshots=folder / "snapshots", work=folder / "work")


def no_evaluation(*_: Any, **__: Any) -> dict[str, float]:
    raise AssertionError("this process must not evaluate")


def test_several_workers_measure_the_same(
    stage: CurveStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes: the same bytes as this one."""
    paths = first_snapshots(stage, 2, tmp_path)
    write_curves(tmp_path / "one.csv", measure_curves(with_workers(stage, 1), paths))
    monkeypatch.setattr(snapshot_curves, "evaluate_model", no_evaluation)
    paths = replace(paths, work=tmp_path / "work2")
    write_curves(tmp_path / "two.csv", measure_curves(with_workers(stage, 2), paths))
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


def test_a_worker_that_dies_is_started_again(
    stage: CurveStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of two processes is killed: the run says so, completes, and has the same bytes."""
    paths = first_snapshots(stage, 2, tmp_path)
    write_curves(tmp_path / "one.csv", measure_curves(with_workers(stage, 1), paths))
    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    paths = replace(paths, work=tmp_path / "work2")
    write_curves(tmp_path / "two.csv", measure_curves(with_workers(stage, 2), paths))
    killer.join()
    assert capsys.readouterr().err.count("it is started again") == 1
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


def kill_a_worker() -> None:
    while True:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
                    return
        time.sleep(0.01)


def test_two_runs_share_the_snapshots(
    stage: CurveStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process evaluates the first snapshot this one does the others; that process
    then dies, and its snapshot is evaluated here."""
    paths, settings = first_snapshots(stage, 3, tmp_path), with_workers(stage, 1)
    first, *_ = snapshot_curves._find_snapshots(settings, paths)
    evaluate_model, evaluated = run.evaluate_model, []
    other = contextlib.ExitStack()
    other.enter_context(exclusive_lock(first.result, "another process"))

    def evaluate(settings: Any, paths: Any, **options: Any) -> dict[str, float]:
        evaluated.append(int(paths.model.name.removeprefix("step-")))
        if evaluated == [20, 25]:
            other.close()
        return evaluate_model(settings, paths, **options)

    monkeypatch.setattr(snapshot_curves, "evaluate_model", evaluate)
    assert [p.step for p in measure_curves(settings, paths) if p.metric == "utility"] == [*STEPS]
    assert evaluated == [20, 25, 10]


@pytest.mark.parametrize(
    ("sampling", "snapshots", "count", "gpus", "inner"),
    [
        ({"workers": 8, "gpus_per_worker": 1}, 34, 8, 1, 1),
        ({"workers": 8, "gpus_per_worker": 1}, 3, 3, 2, 2),  # the draws of each have two
        ({"workers": 8, "gpus_per_worker": 2}, 1, 1, 16, 8),
        ({"workers": 1}, 5, 1, 0, 1),
        ({"workers": 8, "gpus_per_worker": 1, "executor": "ray"}, 34, 1, 0, 8),
    ],
)
def test_workers_are_divided(
    stage: CurveStage, sampling: Any, snapshots: int, count: int, gpus: int, inner: int
) -> None:
    """Over snapshots first, over the draws of each where there are more workers than snapshots."""
    settings = with_workers(stage, sampling.pop("workers"), **sampling)
    workers, config = snapshot_curves._divide_workers(settings, snapshots)
    assert (workers.count, workers.gpus_per_worker, workers.threads) == (count, gpus, 1)
    assert (config.workers, config.threads) == (inner, 1)


def test_vllm_has_a_process_for_each_snapshot(
    stage: CurveStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine keeps the GPU's memory until its process ends."""
    monkeypatch.setattr(snapshot_curves, "evaluate_model", no_evaluation)
    paths, settings = first_snapshots(stage, 1, tmp_path), with_workers(stage, 1)
    evaluate = replace(settings.entry.evaluate, backend="vllm")
    settings = replace(settings, entry=replace(settings.entry, evaluate=evaluate))
    assert {point.step for point in measure_curves(settings, paths)} == {10}


def curve(metric: str, *values: float | None) -> list[CurvePoint]:
    """A metric at the steps 1, 2, …"""
    return [
        CurvePoint(step=s, tokens=10 * s, raw_tokens=7 * s, metric=metric, value=value, se=0.5)
        for s, value in enumerate(values, 1)
    ]


def test_the_summary_by_hand() -> None:
    """The best of a likelihood is the highest, of a negative one the lowest, of several the first;
    `at_best_nll` is what a training stopped at its best likelihood would have. Counts have none."""
    points = [
        *curve("elbo_per_token", -3.0, -1.0, -2.0),
        *curve("nll_per_token", 2.0, 1.5, 1.0),
        *curve("gsm8k/standard/raw/accuracy", 0.5, 0.5, 0.25),
        *curve("dclm/nll_per_token", 1.0, None, 3.0),
        *curve("heldout_tokens", 5.0, 5.0, 5.0),
    ]
    assert summarize_curves(points) == {
        "elbo_per_token": {"last": -2.0, "best": -1.0, "best_step": 2, "at_best_nll": -2.0},
        "nll_per_token": {"last": 1.0, "best": 1.0, "best_step": 3, "at_best_nll": 1.0},
        "gsm8k/standard/raw/accuracy": {
            "last": 0.25, "best": 0.5, "best_step": 1, "at_best_nll": 0.25,
        },
        "dclm/nll_per_token": {"last": 3.0, "best": 1.0, "best_step": 1, "at_best_nll": 3.0},
    }  # fmt: skip
    stopped = summarize_curves([*curve("nll_per_token", 2.0, 1.0, 1.5), *points[:3]])
    assert stopped["elbo_per_token"]["at_best_nll"] == -1.0
    assert "at_best_nll" not in summarize_curves(points[:3])["elbo_per_token"]


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("elbo_per_token_k4", 1),
        ("subset/elbo_per_token_k64", 1),
        ("dclm/nll_in_context_per_token", -1),
        ("questions/standard/cot/cue2/accuracy", 1),
        ("mmlu_stem/standard/raw/accuracy_by_subject/nll_per_token", 1),
        ("numbers_match_selected", 1),
        ("questions/standard/cot/best_cue", 0),
        ("diversity", 0),
    ],
)
def test_the_direction_of_a_metric(metric: str, direction: int) -> None:
    """By the last part of its name."""
    assert metric_direction(metric) == direction


def test_the_table_is_read_as_it_was_written(tmp_path: Path, points: list[CurvePoint]) -> None:
    """To the last bit; a missing number is blank, a missing file empty."""
    expected = [*points, *curve("elbo_per_token", 1 / 3, None)]
    write_curves(tmp_path / "curves" / "one.csv", expected)
    assert read_curves(tmp_path / "curves" / "one.csv") == expected
    lines = (tmp_path / "curves" / "one.csv").read_text().splitlines()
    assert lines[0] == "step,tokens,raw_tokens,metric,value,se"
    assert lines[-1] == "2,20,14,elbo_per_token,,0.5"
    assert read_curves(tmp_path / "none.csv") == []
