"""Snapshots during training: their weights, their counts, kills, and continual runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from boltlm import checkpoint
from boltlm.errors import UserError
from boltlm.fingerprint import hash_path
from boltlm.params import build_settings, load
from boltlm.training import checkpointing, snapshots
from boltlm.training.base import BaseSettings
from boltlm.training.config import SnapshotConfig, TrainSettings
from boltlm.training.metrics_logger import MetricsLogger
from boltlm.training.run import TrainPaths, run_training
from boltlm.training.snapshots import SnapshotWriter
from tests import tiny
from tests.training import harness
from tests.training.harness import raw_run_params, read_log, write_random_chunks

DOCUMENTS, DOCUMENT_TOKENS = 40, 30
WSD = {"kind": "wsd", "warmup": 2, "decay_fraction": 0.25, "min_lr_ratio": 0.1}
FLOAT32 = {"every": 4, "precision": "float32"}


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chunks")
    return write_random_chunks(folder, documents=DOCUMENTS, tokens=DOCUMENT_TOKENS, max_id=200)


def train(chunks: Path, parent: Path, out: Path, *, seed: int = 1, **changes: Any) -> Path:
    """One epoch of raw documents, 10 steps; returns the folder of the snapshots. `changes`: to the
    section `train`."""
    options = {"optimizer": "adamw", "precision": "float32", "batch_size": 4, "log_every": 1}
    options |= {"checkpoint_every": 3, "snapshots": FLOAT32, **changes}
    params = raw_run_params({"kind": "epochs", "amount": 1}, 32, **options) | {"seed": seed}
    files = [out / name for name in ("log.csv", "timing.json", "metrics.json", "snapshots")]
    paths = TrainPaths(parent, chunks, chunks, chunks, out / "work", out / "model", *files)
    run_training(build_settings(TrainSettings, params, name="arm"), paths)
    return out / "snapshots"


def facts_of(folder: Path) -> dict[str, int]:
    return json.loads((folder / "training.json").read_text("utf-8"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, chunks: Path, base_folder: Path) -> Path:
    """The folder of a finished run with float32 snapshots."""
    out = tmp_path_factory.mktemp("finished")
    train(chunks, base_folder, out)
    return out


def test_snapshots_of_every_fourth_step_and_of_the_last_one(finished: Path) -> None:
    """With the tokens of the training curve, and the raw tokens of all documents at the end. The
    last one is the published model, byte for byte."""
    folder = finished / "snapshots"
    assert names(folder) == ["step-000000004", "step-000000008", "step-000000010"]
    tokens = {line["step"]: line["tokens"] for line in read_log(finished / "log.csv")}
    for path in folder.iterdir():
        facts = facts_of(path)
        assert path.name == f"step-{facts['steps']:09}"
        assert facts["tokens"] == tokens[facts["steps"]]
        assert 0.8 < facts["raw_tokens_seen"] / facts["tokens"] < 1
    assert facts_of(folder / "step-000000010")["raw_tokens_seen"] == DOCUMENTS * DOCUMENT_TOKENS
    published, last = finished / "model", folder / "step-000000010"
    for name in ("model.safetensors", "tokenizer.json"):
        assert (last / name).read_bytes() == (published / name).read_bytes()
    configs = [json.loads((path / "config.json").read_text()) for path in (published, last)]
    assert configs[0] == configs[1]
    assert not list((finished / "work").rglob("step-*"))


def test_bfloat16_snapshots_are_the_rounded_weights(
    finished: Path, chunks: Path, base_folder: Path, tmp_path: Path
) -> None:
    """Two bytes for a parameter; they load in any precision, and the training is the same."""
    config = {"every": 4, "precision": "bfloat16"}
    folder = train(chunks, base_folder, tmp_path, snapshots=config)
    assert hash_path(tmp_path / "model") == hash_path(finished / "model")
    assert names(folder) == names(finished / "snapshots")
    for name in names(folder):
        path = folder / name
        rounded = load_file(path / "model.safetensors")
        exact = load_file(finished / "snapshots" / name / "model.safetensors")
        assert rounded.keys() == exact.keys()
        for parameter, weight in exact.items():
            assert torch.equal(rounded[parameter], weight.to(torch.bfloat16))
        assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
        size = sum(2 * weight.numel() for weight in exact.values())
        assert size < (path / "model.safetensors").stat().st_size < size + 10_000
        loaded = checkpoint.load_model(path).state_dict()
        assert torch.equal(loaded["lm_head.weight"], rounded["lm_head.weight"].float())


@pytest.mark.parametrize("tied", [False, True])
def test_a_snapshot_has_the_weights_of_the_checkpoint_of_its_step(
    tied: bool, base_folder: Path, tmp_path: Path
) -> None:
    """Also where input and output embedding are one matrix."""
    writer = SnapshotWriter(
        tmp_path / "snapshots",
        SnapshotConfig(every=2, precision="float32"),
        tokenizer=base_folder,
        raw_tokens=lambda steps: 10 * steps,
    )
    model = tiny.llama(2, vocab_size=harness.VOCAB_SIZE, hidden_size=16, tied=tied)
    config = tiny.train_config(checkpoint_every=2)
    harness.train(config, None, tmp_path, model=model, snapshots=writer)
    for step in (4, 6):
        state = checkpointing.read_state(tmp_path / "run" / f"step-{step:09}.pt")
        folder = tmp_path / "snapshots" / f"step-{step:09}"
        weights = checkpoint.load_model(folder).state_dict()
        assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != tied
        for name, weight in weights.items():
            assert torch.equal(weight, state["model"][f"model.{name}"])
        assert facts_of(folder)["raw_tokens_seen"] == 10 * step


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("killed_after", [3, 5, 9])
def test_a_resumed_run_has_the_same_snapshots(
    every: int,
    killed_after: int,
    chunks: Path,
    base_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Byte for byte; those that were written before the kill are not written again, also where
    their steps are repeated, because the last checkpoint was earlier."""
    config = {"every": every, "precision": "bfloat16"}
    expected = train(chunks, base_folder, tmp_path / "undisturbed", snapshots=config)
    add, save = MetricsLogger.add, SnapshotWriter.save
    saved: list[int] = []

    def killing_add(self: MetricsLogger, *args: Any, **named: Any) -> None:
        add(self, *args, **named)
        if self.step == killed_after:
            raise InterruptedError

    def recording_save(self: SnapshotWriter, *args: Any) -> None:
        save(self, *args)
        saved.append(args[2])

    monkeypatch.setattr(SnapshotWriter, "save", recording_save)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLogger, "add", killing_add)
        with pytest.raises(InterruptedError):
            train(chunks, base_folder, tmp_path / "killed", snapshots=config)
    assert not (tmp_path / "killed" / "snapshots").exists()
    resumed = train(chunks, base_folder, tmp_path / "killed", snapshots=config)
    assert hash_path(resumed) == hash_path(expected)
    assert saved == [int(name.removeprefix("step-")) for name in names(expected)]


def test_a_kill_while_a_snapshot_is_written(
    finished: Path,
    chunks: Path,
    base_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of it is on the disk under another name, which the resumed run replaces."""
    save_model = checkpoint.save_model

    def killed_save(model: Any, folder: Path, *args: Any) -> None:
        save_model(model, folder, *args)
        if folder.name == ".step-000000008":
            (folder / "model.safetensors").write_bytes(b"half")
            (folder / "left-behind").touch()
            raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(snapshots.checkpoint, "save_model", killed_save)
        with pytest.raises(OSError, match="no space left"):
            train(chunks, base_folder, tmp_path)
    resumed = train(chunks, base_folder, tmp_path)
    assert hash_path(resumed) == hash_path(finished / "snapshots")


def test_a_missing_snapshot_is_an_error(
    chunks: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone tidied the folder of unfinished work: the output may not lack one silently."""
    save = SnapshotWriter.save

    def removing_save(self: SnapshotWriter, *args: Any) -> None:
        save(self, *args)
        if args[2] == 8:
            shutil.rmtree(self.folder / "step-000000004")

    monkeypatch.setattr(SnapshotWriter, "save", removing_save)
    with pytest.raises(UserError, match=r"step-000000004: this snapshot was removed.*run again"):
        train(chunks, base_folder, tmp_path)


def test_without_snapshots_the_output_is_an_empty_folder(
    finished: Path, chunks: Path, base_folder: Path, tmp_path: Path
) -> None:
    """And the model is the same as with them; those of an earlier run are removed."""
    shutil.copytree(finished / "snapshots", tmp_path / "snapshots")
    assert names(train(chunks, base_folder, tmp_path, snapshots=None)) == []
    assert hash_path(tmp_path / "model") == hash_path(finished / "model")
    assert (tmp_path / "log.csv").read_bytes() == (finished / "log.csv").read_bytes()


def test_snapshots_of_a_continual_run(chunks: Path, base_folder: Path, tmp_path: Path) -> None:
    """Steps, tokens and raw tokens include those of the parent up to its decay."""
    train(chunks, base_folder, tmp_path / "one", schedule=WSD)
    predecay = facts_of(tmp_path / "one" / "model" / "predecay")
    steps = predecay["steps"]
    folder = train(chunks, tmp_path / "one" / "model", tmp_path / "two", seed=2, schedule=WSD)
    found = [facts_of(path) for path in sorted(folder.iterdir())]
    assert [facts["steps"] for facts in found] == [
        step for step in range(steps + 1, steps + 11) if step % 4 == 0 or step == steps + 10
    ]
    log = {line["step"]: line["tokens"] for line in read_log(tmp_path / "two" / "log.csv")}
    assert all(facts["tokens"] == log[facts["steps"]] for facts in found)
    total = predecay["raw_tokens_seen"] + DOCUMENTS * DOCUMENT_TOKENS
    assert found[-1]["raw_tokens_seen"] == total
    assert np.all(np.diff([facts["raw_tokens_seen"] for facts in found]) > 0)


def test_a_parent_without_counts_is_an_error(
    chunks: Path, base_folder: Path, tmp_path: Path
) -> None:
    """The raw tokens seen would otherwise be too few."""
    train(chunks, base_folder, tmp_path / "one", schedule=WSD, snapshots=None)
    with pytest.raises(UserError, match=r"models\.arm\.train\.snapshots: .* not counted"):
        train(chunks, tmp_path / "one" / "model", tmp_path / "two", seed=2, schedule=WSD)


def test_invalid_snapshots_are_an_error() -> None:
    """The base model has none: no arm is compared along its training."""
    params = load(tiny.ROOT / "params.yaml")
    params["base"]["train"]["snapshots"] = None
    with pytest.raises(UserError, match=r"unknown key base\.train\.snapshots"):
        build_settings(BaseSettings, params)
    params = raw_run_params({"kind": "epochs", "amount": 1}, 32)
    for value, message in (
        ({"every": 0, "precision": "float32"}, r"train\.snapshots\.every must be 1 or more"),
        ({"every": 5, "precision": "float16"}, r"snapshots\.precision must be float32 \| bfloat16"),
        ({"every": 5}, r"missing key train\.snapshots\.precision"),
    ):
        params["train"]["snapshots"] = value
        with pytest.raises(UserError, match=message):
            build_settings(TrainSettings, params, name="arm")
