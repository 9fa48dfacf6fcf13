"""The graph as its users run it: `dvc repro` on the smoke preset, twice, interrupted, changed."""

import csv
import json
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": "src",
    "GIT_AUTHOR_NAME": "test",
    "GIT_AUTHOR_EMAIL": "test@localhost",
    "GIT_COMMITTER_NAME": "test",
    "GIT_COMMITTER_EMAIL": "test@localhost",
}


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def clone(folder: Path) -> Path:
    """A repository of its own with the smoke preset, and nothing computed."""
    folder.mkdir()
    for name in ("stages", "src"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "presets" / "smoke.yaml", folder / "params.yaml")
    (folder / "metrics" / "latents").mkdir(parents=True)
    for name in ("inputs", "collected"):
        shutil.copytree(ROOT / "metrics" / name, folder / "metrics" / name)
    run(folder, "git", "init", "-q")
    run(folder, "dvc", "init", "-q")
    return folder


def outputs(folder: Path) -> dict[str, Any]:
    """Content of every model and every table, by path, as DVC hashed it."""
    lock = yaml.safe_load((folder / "dvc.lock").read_text("utf-8"))
    outs = [out for stage in lock["stages"].values() for out in stage.get("outs", [])]
    return {o["path"]: o["md5"] for o in outs if not o["path"].startswith("metrics/")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = clone(tmp_path_factory.mktemp("pipeline") / "one")
    run(folder, "dvc", "repro")
    return folder


def stage_command(folder: Path, name: str) -> list[str]:
    """A stage's command, as dvc.lock holds it, with this interpreter."""
    lock = yaml.safe_load((folder / "dvc.lock").read_text("utf-8"))
    command = lock["stages"][name]["cmd"]
    setting, python, *rest = shlex.split(command)
    assert (setting, python) == ("PYTHONPATH=src", "python")
    return [sys.executable, *rest]


@pytest.mark.timeout(3600)
def test_the_graph_runs_and_leaves_every_artefact(finished: Path) -> None:
    """Every model has weights and metrics, and there are figures and a report."""
    for model in ("warmstart", "em1", "em2", "raw_flops"):
        assert (finished / "models" / model / "model.safetensors").is_file()
        measured = json.loads((finished / "metrics" / "eval" / f"{model}.json").read_text())
        assert measured["nll_per_token"] > 0
        assert ("elbo_per_token_se" in measured) == (model != "raw_flops")
    assert (finished / "metrics" / "figures" / "report.md").is_file()
    assert (finished / "metrics" / "figures" / "training.png").is_file()
    page = (finished / "reports" / "workspace" / "index.html").read_text("utf-8")
    assert "The EM chain warmstart → em1 → em2 has 2 iterations" in page


@pytest.mark.timeout(3600)
def test_the_snapshots_of_a_training_have_curves(finished: Path) -> None:
    """Of em1, the only model with snapshots: one for every second step and one for the last step,
    evaluated on as many documents and questions as the entry of `curves` says."""
    with (finished / "metrics" / "train" / "em1.csv").open() as file:
        tokens = {int(line["step"]): int(line["tokens"]) for line in csv.DictReader(file)}
    with (finished / "metrics" / "curves" / "em1.csv").open() as file:
        lines = list(csv.DictReader(file))
    steps = sorted({int(line["step"]) for line in lines})
    assert steps == sorted({*range(2, max(tokens), 2), max(tokens)})
    assert len(steps) > 1
    assert int(lines[-1]["tokens"]) == tokens[steps[-1]]
    facts = json.loads((finished / "models" / "em1" / "training.json").read_text())
    assert int(lines[-1]["raw_tokens"]) == 2 * facts["raw_tokens"], "two epochs"
    last = {line["metric"]: line["value"] for line in lines if int(line["step"]) == steps[-1]}
    assert (last["heldout_documents"], last["questions/standard/latent/questions"]) == ("10", "10")
    summary = json.loads((finished / "metrics" / "curves" / "em1.json").read_text())
    assert summary["elbo_per_token"]["last"] == float(last["elbo_per_token"])
    assert not list((finished / "snapshots" / "em2").iterdir())
    assert (finished / "metrics" / "figures" / "accuracy_exact.png").is_file()


@pytest.mark.timeout(3600)
def test_the_flop_matched_baseline_saw_as_many_tokens_as_the_latent_run(finished: Path) -> None:
    """FLOP-matched means the same number of training tokens, to the token."""
    facts = [
        json.loads((finished / "models" / name / "training.json").read_text())
        for name in ("em2", "raw_flops")
    ]
    assert facts[0]["tokens"] == facts[1]["tokens"]


@pytest.mark.timeout(3600)
def test_a_second_repro_does_nothing(finished: Path) -> None:
    """Nothing that a stage writes may make another one, or itself, look out of date; only what logs
    to MLflow always runs."""
    assert re.findall(r"Running stage '(\S+)'", run(finished, "dvc", "repro")) == ["track"]


@pytest.mark.timeout(3600)
def test_the_same_seed_gives_identical_artefacts(finished: Path, tmp_path: Path) -> None:
    """Models and tables of two runs are equal to the byte (CPU, one thread)."""
    other = clone(tmp_path / "other")
    run(other, "dvc", "repro", "evaluate@em1")
    theirs = outputs(other)
    assert "models/em1" in theirs
    assert "models/em2" not in theirs, "evaluate@em1 needs no second iteration"
    ours = outputs(finished)
    assert theirs == {path: ours[path] for path in theirs}


@pytest.mark.timeout(3600)
def test_a_killed_e_step_resumes_and_ends_the_same(finished: Path) -> None:
    """After a SIGKILL only unfinished shards are drawn again, and no byte differs."""
    folder = finished / "data" / "latents" / "em2"
    before = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    assert len(before) > 2
    shutil.rmtree(finished / ".work")
    command = stage_command(finished, "latents@em2")
    process = subprocess.Popen(command, cwd=finished, env=ENVIRONMENT)
    work = finished / ".work" / "latents"
    while not list(work.glob("*/*/*.sha256")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {
        path: path.stat().st_mtime_ns
        for path in work.glob("*/*/*.parquet")
        if path.with_name(path.name + ".sha256").exists()
    }
    text = run(finished, *command)
    assert f"{len(done)} of {len(before)} shards found" in text
    assert all(path.stat().st_mtime_ns == then for path, then in done.items())
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


@pytest.mark.timeout(3600)
def test_a_stage_that_is_killed_under_dvc_ends_the_same(finished: Path, tmp_path: Path) -> None:
    """The harness of `make chaos` in short: a signal at a random moment of a stage, after which no
    file differs and no process is left; and it notices where a file does differ."""
    from tests.chaos.experiment import STAGES, Experiment

    stages = set(yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"])
    assert {stage.partition("@")[0] for stage in STAGES} == stages - {"input"}
    shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    experiment = Experiment(tmp_path / "copy")
    outcome = experiment.kill("split", signal.SIGTERM, random.Random(1))
    assert (outcome.survived, outcome.tracebacks) == (1, 0), outcome.row()
    path = tmp_path / "copy" / "metrics" / "split.json"
    path.write_text(path.read_text("utf-8") + " ", encoding="utf-8")
    assert experiment.differing_files() == ["metrics/split.json"]


@pytest.mark.timeout(3600)
def test_more_draws_keep_the_first_ones(finished: Path, tmp_path: Path) -> None:
    """Draw k of a chunk depends on k, not on K: a larger K adds to the draws of a smaller."""
    import pyarrow.parquet as pq

    params = yaml.safe_load((finished / "params.yaml").read_text("utf-8"))
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({**params, "k_samples": 3}))
    command = stage_command(finished, "latents@em1")
    command[command.index("--params") + 1] = str(tmp_path / "more.yaml")
    for flag, name in (("--out", "out"), ("--metrics", "m.json"), ("--histogram", "m.csv")):
        command[command.index(flag) + 1] = str(tmp_path / name)
    command[command.index("--timings") + 1] = str(tmp_path / "timings")
    run(finished, *command)
    columns = ["doc_id", "chunk", "sample", "tokens", "finish"]
    ours, more = (
        pq.read_table(sorted(folder.glob("*.parquet")), columns=columns).to_pylist()
        for folder in (finished / "data/latents/em1", tmp_path / "out")
    )
    assert len(more) == len(ours) // params["k_samples"] * 3
    assert [row for row in more if row["sample"] < params["k_samples"]] == ours


@pytest.mark.timeout(3600)
def test_vllm_draws_from_a_trained_checkpoint(finished: Path, tmp_path: Path) -> None:
    """Its log q, and the weights computed from it, are those of a float64 model within 10⁻³. So
    small a model seldom ends a latent: K is large."""
    pytest.importorskip("vllm", reason="vLLM is not installed on this machine")
    params = yaml.safe_load((finished / "params.yaml").read_text("utf-8"))
    params["sampling"] |= {"sampler": "vllm"}
    params["k_samples"] = 64
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    command = [str(BIN / "boltlm"), "verify-weights", "--limit", "100"]
    command += ["--params", str(tmp_path / "params.yaml"), "--model", "models/em1"]
    printed = run(finished, *command, "--chunks", "data/chunks/em")
    errors = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    assert errors["samples"] > 10
    assert errors["log_q_error_max"] < 1e-3
    assert errors["log_weight_error_max"] < 1e-3


@pytest.mark.timeout(3600)
def test_a_larger_k_touches_only_what_depends_on_it(finished: Path) -> None:
    """`dvc exp run -S k_samples=8` may not retrain the base or the warm start."""
    params = (finished / "params.yaml").read_text("utf-8")
    try:
        (finished / "params.yaml").write_text(params.replace("k_samples: 2 ", "k_samples: 3 ", 1))
        status = json.loads(run(finished, "dvc", "status", "--json"))
    finally:
        (finished / "params.yaml").write_text(params)
    # They depend on params.yaml as a whole, or on every metrics file.
    always = {"check", "seeds", "figures", "summary", "report", "track"}
    assert set(status) - always == {"latents@em1", "latents@em2"}


@pytest.mark.timeout(3600)
def test_another_training_seed_is_one_more_training(finished: Path, tmp_path: Path) -> None:
    """Over the same data and latents: no teacher is asked, no latent drawn, no data file changed;
    only that model is trained and evaluated. Another data_seed changes base, documents and all that
    follows."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, symlinks=True)
    path = folder / "params.yaml"
    params = path.read_text("utf-8")
    before = outputs(folder)
    entry = {**yaml.safe_load(params)["models"]["em1"], "seed": 5}
    arm = f"models:\n  em1_seed5: {json.dumps(entry)}\n"
    path.write_text(params.replace("models:\n", arm, 1), encoding="utf-8")
    printed = run(folder, "dvc", "repro", "evaluate@em1_seed5")
    ran = re.findall(r"Running stage '(\S+)'", printed)
    assert ran == ["check", "train@em1_seed5", "evaluate@em1_seed5"]
    after = outputs(folder)
    assert before == {name: after[name] for name in before}
    assert after["models/em1_seed5"] != after["models/em1"]
    path.write_text(params.replace("data_seed: 1", "data_seed: 2", 1), encoding="utf-8")
    assert {"base", "split"} <= set(json.loads(run(folder, "dvc", "status", "--json")))
    run(folder, "dvc", "repro", "split")
    changed = outputs(folder)
    for name in ("models/base", "data/split", "data/chunks"):
        assert changed[name] != before[name]


@pytest.mark.timeout(3600)
def test_a_changed_input_file_is_noticed(finished: Path, tmp_path: Path) -> None:
    """A file that params name is a dependency: when it changes, `dvc status` says so and the stages
    that read it run again. A file under DVC's control is there in an experiment's temporary copy
    of the repository and in that of a queued experiment, too."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, symlinks=True)
    texts = folder / "texts.jsonl"
    texts.write_text('{"text": "One."}\n{"text": "Two."}\n{"text": "Three."}\n', encoding="utf-8")
    columns = dict.fromkeys(("doc_id", "cluster", "latent", "pieces")) | {"text": "text"}
    files = {"kind": "files", "path": "texts.jsonl", "columns": columns, "shuffle_buffer": 0}
    params = yaml.safe_load((folder / "params.yaml").read_text("utf-8"))
    params["inputs"] = {"texts": "texts.jsonl"}
    params["corpora"]["more"] = {"documents": 2, "source": files}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    assert "Running stage 'input@texts'" in run(folder, "dvc", "repro", "split")
    assert "Running stage" not in run(folder, "dvc", "repro", "split")
    described = json.loads((folder / "metrics" / "inputs" / "texts.json").read_text())
    assert (described["files"], described["bytes"]) == (1, texts.stat().st_size)
    more = outputs(folder)["data/chunks"]

    texts.write_text('{"text": "Uno."}\n{"text": "Due."}\n', encoding="utf-8")
    assert "input@texts" in json.loads(run(folder, "dvc", "status", "--json"))
    assert "Running stage 'split'" in run(folder, "dvc", "repro", "split")
    assert outputs(folder)["data/chunks"] != more

    run(folder, "dvc", "add", "texts.jsonl")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "texts")
    run(folder, "dvc", "exp", "run", "--temp", "-S", "corpora.more.documents=1", "split")
    queued = ("--queue", "--name", "queued", "-S", "split.ngram_size=5")
    run(folder, "dvc", "exp", "run", *queued, "split")
    run(folder, "dvc", "exp", "run", "--run-all")
    assert "queued" in run(folder, "dvc", "exp", "list", "--name-only")


@pytest.mark.timeout(3600)
def test_mlflow_holds_the_experiment_and_its_children(finished: Path) -> None:
    """One run for the experiment and one for each part, with curves and wall-clock figures."""
    with sqlite3.connect(finished / "mlflow.db") as database:
        names = [name for (name,) in database.execute("select name from runs")]
        metrics = database.execute(
            "select step, value from metrics join runs using (run_uuid) where"
            " key = 'elbo' order by step"
        ).fetchall()
        speeds = database.execute(
            "select distinct runs.name from metrics join runs using (run_uuid)"
            " where key = 'tokens_per_second'"
        ).fetchall()
    assert names.count("default") == 1, "also after a second dvc repro"
    assert {"em1", "em2", "raw_flops"} <= set(names)
    assert {step for step, _ in metrics} == {0, 1, 2}
    assert {"base", "em1", "em2", "raw_flops"} <= {name for (name,) in speeds}


@pytest.mark.timeout(3600)
def test_no_tracked_file_holds_a_wall_clock_figure(finished: Path) -> None:
    """They would differ after every run of what is committed."""
    for path in (finished / "metrics").rglob("*.*"):
        if path.suffix in (".json", ".csv", ".md"):
            text = path.read_text("utf-8")
            for word in ("second", "mfu", "memory"):
                assert word not in text, f"{path}: {word}"


FILES = {"corpus": {"kind": "files", "path": "no/such.jsonl"}}
ERRORS = {
    "an unknown key": ({"chunks": {"mean": 3}}, "unknown key chunks.mean"),
    "a wrong path": ({"inputs": {"no": "no"}, **FILES}, "no/such.jsonl': no such file"),
    "a wrong kind": ({"corpus": {"kind": "web"}}, "kind must be"),
    "a text instead of a seed": ({"data_seed": "one"}, "seed must be of type int, found 'one'"),
    "an unnamed file": (
        {"inputs": {}, **FILES},
        "'no/such.jsonl' is not among `inputs`",
    ),
    "a short context": ({"max_latent_tokens": 255}, "context"),
}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", ERRORS)
def test_a_wrong_parameter_gives_one_line(finished: Path, tmp_path: Path, case: str) -> None:
    """What a user can cause gets a message and no traceback."""
    change, message = ERRORS[case]
    params = yaml.safe_load((finished / "params.yaml").read_text("utf-8"))
    columns = {"text": "text", "doc_id": None, "cluster": None, "latent": None, "pieces": None}
    for key, value in change.items():
        if key == "corpus":
            value = {"columns": columns, "shuffle_buffer": 0, **value}
            for corpus in params["corpora"].values():
                corpus["source"] = {}
            params["questions"] = {"count": 0, "source": {}}
        params[key] = {**params[key], **value} if key == "chunks" else value
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    command = [
        sys.executable,
        "stages/split.py",
        "--params",
        str(tmp_path / "params.yaml"),
        "--base",
        "models/base",
        "--work",
        str(tmp_path / "work"),
        "--split",
        str(tmp_path / "split"),
        "--chunks",
        str(tmp_path / "chunks"),
        "--metrics",
        str(tmp_path / "m.json"),
    ]
    done = subprocess.run(
        command, cwd=finished, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]  # one for each finding
    assert all(line.startswith("split: 0/") for line in set(lines).difference(errors))  # progress
    assert any(message in line for line in errors)
