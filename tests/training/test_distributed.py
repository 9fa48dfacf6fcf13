"""Two processes on the CPU (gloo): the log and the checkpoint equal those of a single process."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from boltlm import checkpoint
from tests.training.harness import TrainStage, column, raw_run_params, write_random_chunks

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
FSDP = [*ACCELERATE, "--use_fsdp", "--mixed_precision", "no", "--dynamo_backend", "no"]
pytestmark = pytest.mark.timeout(1800)  # each process imports torch; six of them in a test


def train_stage(folder: Path, base: Path, **changes: Any) -> TrainStage:
    """The stage with ten steps of five sequences. `changes`: to the section `train`."""
    chunks = write_random_chunks(folder / "chunks", documents=30, tokens=50, max_id=99)
    train = {"optimizer": "adamw", "precision": "float32", "log_every": 1}
    train |= {"batch_size": 5, "micro_batch_size": 2, "checkpoint_every": 4, **changes}
    budget = {"kind": "steps", "amount": 10}
    return TrainStage(folder, base, chunks, raw_run_params(budget, 32, **train))


def assert_same_losses(log: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    np.testing.assert_allclose(column(log, "loss"), column(expected, "loss"), atol=1e-5)


@pytest.mark.parametrize("launcher", [TORCHRUN, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_train_like_one(
    launcher: list[str], base_folder: Path, tmp_path: Path
) -> None:
    """The same global batch (5 sequences, so one process gets padding): losses within 10⁻⁵, and the
    checkpoint, written as complete tensors, loads in a single process with the same logits. So
    does a snapshot of an earlier step; the last one is the model that is published."""
    stage = train_stage(tmp_path, base_folder, snapshots={"every": 4, "precision": "float32"})
    expected, log = stage.run("single"), stage.run("double", launcher)
    assert len(expected) == len(log) == 10
    assert expected[0]["loss"] - expected[-1]["loss"] > 0.01
    assert_same_losses(log, expected)
    for name in ("tokens", "lr"):
        assert column(log, name) == column(expected, name)
    np.testing.assert_allclose(column(log, "grad_norm"), column(expected, "grad_norm"), rtol=1e-3)
    folders = (tmp_path / "single", tmp_path / "double", base_folder)
    ids_BL = torch.arange(20)[None]
    with torch.no_grad():
        single, double, start = (checkpoint.load_model(f)(input_ids=ids_BL).logits for f in folders)
    torch.testing.assert_close(double, single, atol=1e-4, rtol=1e-4)
    assert (double - start).abs().max() > 1e-2
    one, two = (tmp_path / f"{name}-snapshots" for name in ("single", "double"))
    steps = ["step-000000004", "step-000000008", "step-000000010"]
    assert sorted(path.name for path in two.iterdir()) == steps
    for step in steps:
        weights, expected_weights = (load_file(f / step / "model.safetensors") for f in (two, one))
        for name, weight in expected_weights.items():
            torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=1e-3)
        assert (two / step / "training.json").read_bytes() == (
            one / step / "training.json"
        ).read_bytes()
    last = two / "step-000000010" / "model.safetensors"
    assert last.read_bytes() == (tmp_path / "double" / "model.safetensors").read_bytes()
    files = [{path.name for path in folder.iterdir()} for folder in folders[:2]]
    assert files[0] == files[1]


def test_muon_and_tied_weights_are_sharded(base_folder: Path, tmp_path: Path) -> None:
    """Muon updates a complete matrix, of which each process holds some rows; a tied matrix is one
    parameter and is published as one."""
    model = checkpoint.load_model(base_folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    tied_base = tmp_path / "base"
    shutil.copytree(base_folder, tied_base)
    checkpoint.save_model(model, tied_base, base_folder, {})
    stage = train_stage(tmp_path, tied_base, optimizer="muon")
    expected, log = stage.run("single"), stage.run("double", FSDP)
    assert expected[0]["loss"] - expected[-1]["loss"] > 0.01
    assert_same_losses(log, expected)
    single, double = (checkpoint.load_model(tmp_path / name) for name in ("single", "double"))
    untied_count = len(list(checkpoint.load_model(base_folder).parameters()))
    assert len({id(parameter) for parameter in double.parameters()}) == untied_count - 1
    for weight, expected_weight in zip(double.parameters(), single.parameters(), strict=True):
        # Muon computes its update in bfloat16.
        torch.testing.assert_close(weight, expected_weight, atol=1e-3, rtol=1e-3)


def test_a_sharded_run_is_resumed_in_one_process(base_folder: Path, tmp_path: Path) -> None:
    """Checkpoints do not depend on the number of processes: two sharded processes resume from them,
    then a single one does. Publishing fails twice, and each time the last checkpoint is corrupted.
    """
    stage = train_stage(tmp_path, base_folder)
    expected = stage.run("single")
    stage = train_stage(tmp_path, base_folder, activation_checkpointing=True, micro_batch_size=1)
    (tmp_path / "double").write_text("a file where the model folder should be")
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            stage.run("double", FSDP, work="shared")
        (last,) = (tmp_path / "shared" / "train").glob("*/step-000000010.pt")
        last.write_bytes(b"corrupt")
    (tmp_path / "double").unlink()
    log = stage.run("double", work="shared")
    assert_same_losses(log, expected)
    single, double = (checkpoint.load_model(tmp_path / name) for name in ("single", "double"))
    for weight, expected_weight in zip(double.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(weight, expected_weight, atol=1e-4, rtol=1e-3)
