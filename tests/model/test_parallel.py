"""Two processes on the CPU (gloo): the curve and the checkpoint of one alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from boltlm.model import checkpoint
from boltlm.params import load
from boltlm.records import Chunk, write_shard
from tests import tiny
from tests.model.test_training import read

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
FSDP = [*ACCELERATE, "--use_fsdp", "--mixed_precision", "no", "--dynamo_backend", "no"]


class Stage:
    """The stage `train` as a process, started by a launcher or alone."""

    def __init__(self, folder: Path, base: Path, **train: Any) -> None:
        self.folder = folder
        draw = np.random.default_rng(1)
        chunks = [
            Chunk(
                doc_id=f"d{d}", chunk=0, text="x", tokens=tuple(draw.integers(2, 99, 50).tolist())
            )
            for d in range(30)
        ]
        write_shard(folder / "chunks" / "00000.parquet", Chunk, chunks)
        params = load(tiny.ROOT / "params.yaml")
        params["sequences"] |= {"length": 32, "layout": "document"}
        params["train"] |= {"optimizer": "adamw", "precision": "float32", "log_every": 1}
        params["train"] |= {"batch_rows": 5, "micro_rows": 2, "checkpoint_every": 4, **train}
        entry = {"corpus": "em", "data": "split/em", "format": "raw", "mix_raw": 0, "train": {}}
        entry["mix_corpus"] = "em"
        budget = {"kind": "steps", "amount": 10}
        params["models"] = {"arm": {**entry, "parent": str(base), "budget": budget}}
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        self.base = base

    def run(
        self, name: str, launcher: list[str], work: str | None = None
    ) -> list[dict[str, float]]:
        """The curve; the model is in the folder `name`."""
        place = self.folder
        command = [sys.executable, *launcher, str(tiny.ROOT / "stages" / "train.py")]
        for flag, value in {
            "params": place / "params.yaml",
            "name": "arm",
            "parent": self.base,
            "chunks": place / "chunks",
            "data": place / "none",
            "mixed": place / "chunks",
            "heldout": place / "chunks",
            "work": place / (work or f"{name}-work"),
            "out": place / name,
            "csv": place / f"{name}.csv",
            "db": place / "mlflow.db",
            "artifacts": place / "artifacts",
        }.items():
            command += [f"--{flag}", str(value)]
        env = {**os.environ, "PYTHONPATH": str(tiny.ROOT / "src"), "OMP_NUM_THREADS": "1"}
        env.pop("DVC_ROOT", None)
        subprocess.run(command, check=True, env=env, timeout=200)
        return read(place / f"{name}.csv")


def losses(curve: list[dict[str, float]]) -> list[float]:
    return [line["loss"] for line in curve]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("launcher", [TORCHRUN, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_train_as_one(launcher: list[str], base_folder: Path, tmp_path: Path) -> None:
    """The same global batch (5 rows, so one process lacks one): losses within 10⁻⁵, the
    checkpoint loads in a single process and says the same; it is one file of whole tensors."""
    stage = Stage(tmp_path, base_folder)
    alone, both = stage.run("alone", []), stage.run("both", launcher)
    assert len(alone) == len(both) == 10
    assert alone[0]["loss"] - alone[-1]["loss"] > 0.01
    np.testing.assert_allclose(losses(both), losses(alone), atol=1e-5)
    for name in ("tokens", "lr"):
        assert [line[name] for line in both] == [line[name] for line in alone]
    np.testing.assert_allclose(
        [line["grad_norm"] for line in both], [line["grad_norm"] for line in alone], rtol=1e-3
    )
    one, other = (checkpoint.load(tmp_path / name) for name in ("alone", "both"))
    start = checkpoint.load(base_folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted, found, before = (model(input_ids=ids).logits for model in (one, other, start))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (found - before).abs().max() > 1e-2
    files = {path.name for path in (tmp_path / "both").iterdir()}
    assert files == {path.name for path in (tmp_path / "alone").iterdir()}


@pytest.mark.timeout(400)
def test_muon_and_tied_weights_are_sharded(base_folder: Path, tmp_path: Path) -> None:
    """Muon makes its step of a whole matrix, of which each process holds rows; a tied matrix is
    one parameter and is published as one."""
    model = checkpoint.load(base_folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    tied = tmp_path / "base"
    shutil.copytree(base_folder, tied)
    checkpoint.save(model, tied, base_folder, {})
    stage = Stage(tmp_path, tied, optimizer="muon")
    alone, both = stage.run("alone", []), stage.run("both", FSDP)
    assert alone[0]["loss"] - alone[-1]["loss"] > 0.01
    np.testing.assert_allclose(losses(both), losses(alone), atol=1e-5)
    one, other = (checkpoint.load(tmp_path / name) for name in ("alone", "both"))
    found = {id(p) for p in other.parameters()}
    assert len(found) == len(list(checkpoint.load(base_folder).parameters())) - 1
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)  # its step is made in bfloat16


@pytest.mark.timeout(400)
def test_a_sharded_run_goes_on_in_one_process(base_folder: Path, tmp_path: Path) -> None:
    """What is kept is whole, whoever wrote it: sharded processes go on from it, then one alone. No
    model is published before, and of the checkpoints the last is torn."""
    stage = Stage(tmp_path, base_folder)
    alone = stage.run("alone", [])
    crash = Stage(tmp_path, base_folder, activation_checkpointing=True, micro_rows=1)
    (tmp_path / "both").write_text("no folder can be made here")
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            crash.run("both", FSDP, work="shared")
        (last,) = (tmp_path / "shared" / "train").glob("*/step-000000010.pt")
        last.write_bytes(b"torn")
    (tmp_path / "both").unlink()
    found = stage.run("both", [], work="shared")
    np.testing.assert_allclose(losses(found), losses(alone), atol=1e-5)
    one, other = (checkpoint.load(tmp_path / name) for name in ("alone", "both"))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
