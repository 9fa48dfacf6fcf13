"""Files and folders that params name, and what the machine lacks: told before anything runs."""

import gzip
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from boltlm.param_values import Finding
from boltlm.params import build_settings, load
from boltlm.preflight.data import data_findings
from boltlm.preflight.disk import CHECKPOINTS, disk_findings, needed_bytes
from boltlm.preflight.machine import machine_findings
from boltlm.preflight.models import checkpoint_findings
from boltlm.reporting.plan import Planner
from boltlm.reporting.plan_config import ACCELERATORS, PlanSettings
from boltlm.training.checkpointing import MAX_CHECKPOINTS
from tests import tiny
from tests.preflight.test_bad_params import COLUMNS, FILES, LAPTOP, changed

BIN = Path(sys.executable).parent
PIECES = {"column": "chunks", "text": "suffix", "latent": "latent"}


def lines(findings: Any) -> list[str]:
    return [str(finding) for finding in findings]


def corpus_findings(path: Path, **columns: Any) -> list[str]:
    """What is said of `path` as the file of the corpus `em`."""
    source = {**FILES, "path": str(path), "columns": COLUMNS | columns}
    inputs = ("inputs", {"data": str(path.parent)})
    return lines(data_findings(changed(("corpora.em.source", source), inputs)))


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        (None, {}, "no such file, or a folder without any of"),
        (b"", {}, "corpora.em.source: "),
        (b"\n\n", {}, "has no row"),
        (b"{", {}, "em.jsonl, line 1: not JSON"),
        (b"[1]\n", {}, "line 1: expected one JSON object on each line"),
        (b"3\n", {}, "line 1: expected one JSON object on each line"),
        (b"[" * 100_000, {}, "line 1: not JSON: nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", {}, "line 1: not JSON: Exceeds the limit"),
        ('{"text": "é"}'.encode("latin-1"), {}, "cannot be read as UTF-8 JSONL"),
        (b'{"txt": "a"}\n', {}, "row 1: no column 'text'; the row has txt"),
        (b'{"text": null}\n', {}, "row 1: column 'text' is not text, found None"),
        (b'{"text": 3}\n', {}, "row 1: column 'text' is not text, found 3"),
        (b'{"text": "a"}\n', {"doc_id": "id"}, "row 1: no column 'id'"),
        (
            b'{"text": "a", "id": null}\n',
            {"doc_id": "id"},
            "column 'id' must be a text or a number",
        ),
        (b'{"text": "a", "id": {}}\n', {"doc_id": "id"}, "column 'id' must be a text or a number"),
        (b'{"text": "a", "id": "\\ud800"}\n', {"doc_id": "id"}, "half of a surrogate pair"),
        (
            b'{"text": "a", "z": 3}\n',
            {"latent": "z"},
            "column 'z' is not text, found 3",
        ),
        (b'{"text": "a", "z": "\\udfff"}\n', {"latent": "z"}, "half of a surrogate pair"),
        (b'{"text": "a", "book": []}\n', {"cluster": "book"}, "column 'book' must be a text or"),
        (b'{"text": "a"}\n', {"pieces": PIECES}, "row 1: no column 'chunks'"),
        (b'{"text": "a", "chunks": 3}\n', {"pieces": PIECES}, "does not list pieces"),
        (b'{"text": "a", "chunks": []}\n', {"pieces": PIECES}, "do not join to the text"),
    ],
    ids=range(22),
)
def test_a_corpus_that_cannot_be_read_is_one_line(
    tmp_path: Path, content: bytes | None, columns: dict[str, Any], message: str
) -> None:
    """File, row, cause; the library's own errors never reach the user."""
    path = tmp_path / "em.jsonl"
    if content is not None:
        path.write_bytes(content)
    (line,) = corpus_findings(path, **columns)
    assert message in line, line
    assert line.startswith("corpora.em.source: ")


def test_foreign_formats_that_are_damaged_are_named(tmp_path: Path) -> None:
    """A Parquet file that is cut off or is none, and gzip that ends early."""
    for name, content, message in [
        ("a.parquet", b"PAR1" + b"x" * 100, "cannot be read as Parquet"),
        ("b.parquet", b"", "cannot be read as Parquet"),
        ("c.jsonl.gz", b"plain text", "cannot be read as UTF-8 JSONL"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "a"}' * 10)[:-12], "cannot be read as UTF-8 JSONL"),
    ]:
        (tmp_path / name).write_bytes(content)
        (line,) = corpus_findings(tmp_path / name)
        assert message in line, line
        assert name in line


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "row 1: no column 'answer'; gsm8k needs question, answer"),
        ({"question": 3, "answer": "#### 1"}, "row 1: column 'question' is not text, found 3"),
        ({"question": "a", "answer": None}, "row 1: column 'answer' is not text, found None"),
    ],
)
def test_a_benchmark_of_another_shape_is_one_line(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    """GSM8K files of another shape."""
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(row) + "\n")
    changes = ("benchmarks", {"gsm8k": str(path)}), ("inputs", {"gsm8k": str(path)})
    (line,) = lines(data_findings(changed(*changes)))
    assert line.startswith(f"benchmarks.gsm8k: {path}"), line
    assert message in line


def test_inputs_and_prompts_that_are_missing_are_named() -> None:
    """Before a teacher is paid."""
    openai = load(tiny.ROOT / "presets" / "openai.yaml")["teachers"]["warmstart"]
    params = changed(
        ("inputs", {"books": "no/such"}),
        ("prompts.teacher", "no/such"),
        ("teachers.warmstart", openai),
    )
    missing, prompt = lines(data_findings(params))
    assert missing == "inputs.books: 'no/such' does not exist; correct the path"
    assert prompt.startswith("prompts.teacher: no/such/latent.txt cannot be read")


def write_checkpoint(folder: Path, **changes: Any) -> None:
    """A checkpoint of which only headers are true; `changes` replace parts, None removes one."""
    header = {
        "model.embed_tokens.weight": {"dtype": "F32", "shape": [4, 1], "data_offsets": [0, 16]}
    }
    text = json.dumps(header).encode()
    parts: dict[str, Any] = {
        "config.json": {"max_position_embeddings": 64, "eos_token_id": 1, "bos_token_id": 0},
        "tokenizer.json": {"model": {"vocab": {"a": 0, "b": 3}}, "added_tokens": []},
        "model.safetensors": struct.pack("<Q", len(text)) + text + b"\0" * 16,
    }
    folder.mkdir()
    for name, content in (parts | changes).items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content is not None:
            (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"config.json": {"n_positions": 64, "eos_token_id": 1}}, None),
        ({"config.json": None}, "has no config.json; save model and tokenizer there"),
        ({"config.json": b"{"}, "config.json is not JSON"),
        ({"config.json": [1]}, "config.json must hold a JSON object"),
        ({"tokenizer.json": None}, "has no tokenizer.json"),
        ({"config.json": {"eos_token_id": 1}}, "has no context length (max_position_embeddings or"),
        ({"config.json": {"n_positions": 0, "eos_token_id": 1}}, "has no context length"),
        ({"config.json": {"n_positions": 9}}, "names an end-of-text token (EOS)"),
        (
            {"config.json": {"n_positions": 9, "eos_token_id": 1, "auto_map": {}}},
            "asks for code of its own (auto_map), which is never run",
        ),
        (
            {"tokenizer.json": {"model": {"vocab": {"a": 4}}}},
            "has 5 tokens, but model.embed_tokens.weight has only 4 rows",
        ),
        (
            {"tokenizer.json": {"model": {}, "added_tokens": [{"content": "<|latent|>", "id": 1}]}},
            "its tokenizer already has <|latent|>",
        ),
        ({"model.safetensors": None}, "has no weights; save the model as safetensors"),
        (
            {"model.safetensors": None, "pytorch_model.bin": b"x"},
            "has only pytorch_model.bin, which can run code",
        ),
        ({"model.safetensors": b"\1"}, "model.safetensors is damaged"),
        ({"model.safetensors": b"\xff" * 40}, "is damaged (the header is too long)"),
        ({"model.safetensors": struct.pack("<Q", 2) + b"{}xx"}, "12 bytes, its header says 10"),
        (
            {"model.safetensors.index.json": {"weight_map": {"a": "b.safetensors"}}},
            "lists b.safetensors, which",
        ),
    ],
    ids=range(18),
)
def test_a_checkpoint_is_judged_by_its_files(
    tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    """Without torch, and before the hub is asked for it."""
    write_checkpoint(tmp_path / "model", **changes)
    findings = lines(checkpoint_findings("base.model", str(tmp_path / "model")))
    if message is None:
        assert findings == []
    else:
        (line,) = findings
        assert message in line
        assert line.startswith("base.model: ")


@pytest.mark.parametrize("model", ["./llama", "/no/such", "src/boltlm-7b", "../x", "a/b/c"])
def test_a_mistyped_path_is_no_hub_name(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """The hub library retries for a minute; a folder's name is refused at once."""
    monkeypatch.chdir(tiny.ROOT)
    (line,) = lines(checkpoint_findings("base.model", model))
    assert line == f"base.model: there is no folder '{model}'; correct the path, or give a hub name"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("launcher", "acelerate launch", "there is no program 'acelerate' here"),
        ("launcher", 'python "', "launcher is no shell command (No closing quotation)"),
        (
            "sampling",
            {"gpus_per_worker": 1, "workers": 2},
            "but this machine has 0 GPUs",
        ),
        (
            "sampling",
            {"executor": "ray", "address": "ray://"},
            "must be <host>:<port>",
        ),
        ("base", {"kind": "checkpoint", "model": "nobody/nothing"}, "and HF_HUB_OFFLINE is set"),
    ],
)
def test_what_the_machine_lacks_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    """No library is loaded and no server is asked twice. The folder has no base model: with one,
    its source is not needed any more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    merged = LAPTOP[key] | value if key == "sampling" else value
    findings = lines(machine_findings(changed((key, merged))))
    assert any(message in line for line in findings), findings


def test_a_ray_cluster_that_does_not_answer_is_told() -> None:
    address = f"127.0.0.1:{free_port()}"
    sampling = LAPTOP["sampling"] | {"executor": "ray", "address": address}
    findings = lines(machine_findings(changed(("sampling", sampling))))
    assert any(f"nothing answers at {address} within 1 s" in line for line in findings), findings


def test_a_name_that_is_not_resolved_costs_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that does not answer takes longer than the limit of a connection."""
    resolved = threading.Event()

    def connect(*_: object, **__: object) -> None:
        resolved.wait(60)
        raise OSError("no such host")

    monkeypatch.setattr("socket.create_connection", connect)
    sampling = LAPTOP["sampling"] | {"executor": "ray", "address": "nowhere:1"}
    findings = lines(machine_findings(changed(("sampling", sampling))))
    resolved.set()
    assert any("nothing answers at nowhere:1 within 1 s" in line for line in findings), findings


def test_a_disk_that_is_too_small_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights of the laptop experiment, and the checkpoints of one training, must fit; what is
    done needs nothing."""
    assert CHECKPOINTS == MAX_CHECKPOINTS + 1
    settings = build_settings(PlanSettings, LAPTOP)
    assert settings.model_size is not None
    weights = 4 * settings.model_size.parameters
    needed = needed_bytes(LAPTOP, set())
    models = len(settings.models) + 1
    assert (models + 3 * CHECKPOINTS) * weights < needed < 1.5 * (models + 9) * weights
    planned = Planner(settings, ACCELERATORS["cpu"], 1).stages()
    assert needed_bytes(LAPTOP, {stage.stage for stage in planned}) == 0
    for free in (needed, needed - 1):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda _, usage=usage: usage)
        findings = lines(disk_findings(LAPTOP, tmp_path))
        assert len(findings) == (free < needed), findings
        assert all(f"are free in {tmp_path}; make room there" in line for line in findings)


def test_packages_that_are_not_installed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    sampling = LAPTOP["sampling"] | {"executor": "ray", "sampler": "vllm"}
    findings = lines(machine_findings(changed(("sampling", sampling))))
    assert findings[:2] == [
        "sampling.sampler is vllm, which is not installed here; install it or change the key",
        "sampling.executor is ray, which is not installed here; install it or change the key",
    ]


@pytest.mark.parametrize("name", ["x; touch pwned", "$(touch pwned)", "x'; touch pwned; '"])
def test_names_reach_no_shell(tmp_path: Path, name: str) -> None:
    """`dvc repro` itself, whose first stage is the check: one line, and nothing is executed."""
    for part in ("dvc.yaml", "stages", "src", "metrics"):
        (tmp_path / part).symlink_to(tiny.ROOT / part)
    params = changed((f"models.{name}", LAPTOP["models"]["em1"]))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    command = [sys.executable, "stages/check.py", "--params", "params.yaml", "--marker", "checked"]
    env = {"PATH": f"{BIN}:/usr/bin:/bin", "PYTHONPATH": "src"}
    start = time.process_time()
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert time.process_time() - start < 10
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: params.yaml: a key of models must be a letter followed by")
    assert not list(tmp_path.glob("pwned*")) + list(tmp_path.glob("checked"))


def test_the_check_loads_no_framework() -> None:
    """It must end before torch alone would have been loaded."""
    script = (
        "import sys; from pathlib import Path; from boltlm.preflight.check import *\n"
        f"check_experiment(Path({str(tiny.ROOT / 'params.yaml')!r}))\n"
        "slow = {'torch', 'transformers', 'datasets', 'vllm', 'ray', 'openai', 'lm_eval', 'dvc'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tiny.ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_findings_are_told_from_each_other() -> None:
    """A finding reads as one sentence around its key."""
    assert str(Finding("a.b", " must be 1", "the key ")) == "the key a.b must be 1"
