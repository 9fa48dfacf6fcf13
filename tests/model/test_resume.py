"""A killed training goes on: the numbers and the weights are those of an undisturbed one."""

import csv
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from boltlm import engine
from boltlm.model import resume
from boltlm.model.curve import Curve
from boltlm.model.resume import PREDECAY, Checkpoints
from boltlm.params import load
from boltlm.records import Chunk, write_shard
from tests import tiny
from tests.model.test_training import read, run

STEPS = 6  # of the training in test_training
WAIT_SECONDS = 60.0


class KilledError(Exception):
    pass


def killed_after(steps: int, config: Any, path: Path, work: Path) -> None:
    """Trains and ends like a killed process: after the step, before its checkpoint."""
    add = Curve.add

    def dying(self: Any, *args: Any, **named: Any) -> None:
        add(self, *args, **named)
        if self.step == steps:
            raise KilledError

    Curve.add = dying
    try:
        with pytest.raises(KilledError):
            run(config, path, work)
    finally:
        Curve.add = add


def curve(path: Path) -> list[dict[str, float]]:
    """What does not hang on the clock."""
    clock = ("tokens_per_second", "seconds", "utilisation", "memory_mib")
    return [{k: v for k, v in row.items() if k not in clock} for row in read(path)]


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_it_goes_on_bit_for_bit(optimizer: str, every: int, steps: int, tmp_path: Path) -> None:
    """A moment, a rate, a row or a sum of losses that is lost would change the rest."""
    config = tiny.train_config(optimizer=optimizer, checkpoint_every=every, log_every=2)
    whole, facts = run(config, tmp_path / "whole.csv")
    killed_after(steps, config, tmp_path / "a.csv", tmp_path / "work")
    resumed, again = run(config, tmp_path / "a.csv", tmp_path / "work")
    assert same(whole, resumed)
    assert again == facts
    assert curve(tmp_path / "a.csv") == curve(tmp_path / "whole.csv")


def test_only_what_is_left_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a finished training's checkpoint leaves nothing to do."""
    config = tiny.train_config(checkpoint_every=2)
    killed_after(5, config, tmp_path / "a.csv", tmp_path / "work")
    run(config, None, tmp_path / "work")
    assert "going on behind step 4" in capsys.readouterr().err
    run(config, tmp_path / "a.csv", tmp_path / "work")
    assert "going on behind step 6" in capsys.readouterr().err
    assert [row["step"] for row in read(tmp_path / "a.csv")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("torn", [False, True])
def test_the_state_before_the_decay_outlives_a_kill(torn: bool, tmp_path: Path) -> None:
    """A continual run that is killed in its decay still publishes what was before it; where that
    file is torn, it goes back to before it was made."""
    schedule = tiny.schedule(kind="wsd", decay_fraction=0.5)
    config = tiny.train_config(checkpoint_every=2, schedule=schedule)
    whole, _ = run(config, None, tmp_path / "whole")
    killed_after(5, config, tmp_path / "a.csv", tmp_path / "work")
    path = tmp_path / "work" / "run" / PREDECAY
    if torn:
        path.write_bytes(path.read_bytes()[:-10])
    resumed, _ = run(config, None, tmp_path / "work")
    assert same(whole, resumed)
    one, other = (resume.read(tmp_path / name / "run" / PREDECAY) for name in ("whole", "work"))
    assert one["steps"] == other["steps"] == 3
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def test_a_torn_checkpoint_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last two are kept; the last one is cut short, as by a machine that went down."""
    config = tiny.train_config(checkpoint_every=1)
    whole, _ = run(config, tmp_path / "whole.csv")
    killed_after(5, config, tmp_path / "a.csv", tmp_path / "work")
    paths = sorted((tmp_path / "work").rglob("step-*.pt"))
    assert [int(path.stem[5:]) for path in paths] == [3, 4]
    paths[-1].write_bytes(paths[-1].read_bytes()[:-100])
    resumed, _ = run(config, tmp_path / "a.csv", tmp_path / "work")
    said = capsys.readouterr().err
    assert "step-000000004.pt is torn" in said
    assert "going on behind step 3" in said
    assert same(whole, resumed)


def test_what_is_passed_over_is_taken_away(tmp_path: Path) -> None:
    """Else the torn ones, being the newest, would be kept and every new one deleted; what a killed
    write left is taken away as well."""
    for torn, left in ((False, [1, 2]), (True, [1, 2])):
        kept = Checkpoints(tmp_path / str(torn), 1, "tests")
        for steps in (4, 5):
            kept.save(steps, {"steps": steps})
        (kept.folder / ".step-6.pt.77").write_bytes(b"half")
        if torn:
            for path in kept.folder.glob("*.pt"):
                path.write_bytes(b"torn")
            assert kept.latest() is None
        else:  # beyond the state before the decay, which is not there
            assert kept.latest(decay=3) is None
        assert not list(kept.folder.iterdir())
        for steps in (1, 2):
            kept.save(steps, {"steps": steps})
        assert [int(path.stem[5:]) for path in sorted(kept.folder.glob("*.pt"))] == left
        assert kept.latest() == {"steps": 2}


def test_a_full_disk_under_the_curve_does_not_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said once; at the end, where there is room again, the file has every line."""
    curve = Curve(tmp_path / "a.csv", every=1, flops=0.0, memory=lambda: 1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with curve:
        for step in range(6):
            if step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (150, hard))
            curve.add(10, 2.0, rate=0.1, norm=1.0, heldout={}, last=False)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.count("written at the end") == 1
    assert [line["step"] for line in read(tmp_path / "a.csv")] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_does_not_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told, the older checkpoint stays, and nothing half-written does."""
    kept = Checkpoints(tmp_path, 1, "tests")
    kept.save(1, {"steps": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        kept.save(2, {"steps": 2, "model": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no checkpoint at step 2" in capsys.readouterr().err
    assert kept.latest() == {"steps": 1}
    assert len(list(kept.folder.iterdir())) == 2  # it and its checksum


def test_a_finished_training_leaves_nothing(tmp_path: Path) -> None:
    """Work folders of weeks would fill the disk."""
    kept = Checkpoints(tmp_path / "name", 1, "tests")
    for steps in range(1, 6):
        kept.save(steps, {"steps": steps})
    assert len(list(kept.folder.glob("*.pt"))) == resume.KEPT
    kept.clear()
    assert not kept.folder.exists()
    assert kept.latest() is None


def test_sigkill_of_the_stage(base_folder: Path, tmp_path: Path) -> None:
    """Three kills at steps of their own; then the losses and the model's bytes are those of a
    stage that was left alone, and the work folder is empty."""
    draw = np.random.default_rng(1)
    chunks = [
        Chunk(doc_id=f"d{d}", chunk=0, text="x", tokens=tuple(draw.integers(2, 200, 60).tolist()))
        for d in range(1200)
    ]
    write_shard(tmp_path / "chunks" / "00000.parquet", Chunk, chunks)
    params = load(tiny.ROOT / "params.yaml")
    params["train"] |= {"batch_rows": 2, "log_every": 1, "checkpoint_every": 5}
    params["sequences"] |= {"length": 64, "layout": "document"}
    entry = {"parent": "base", "corpus": "em", "data": "split/em", "format": "raw", "train": {}}
    entry |= {"mix_raw": 0, "mix_corpus": "em"}
    params["models"] = {"arm": {**entry, "budget": {"kind": "epochs", "amount": 1}}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(tiny.ROOT / "stages" / "train.py"), "--name", "arm"]
        for flag, place in {
            "params": tmp_path / "params.yaml",
            "parent": base_folder,
            "chunks": tmp_path / "chunks",
            "data": tmp_path / "data",
            "mixed": tmp_path / "chunks",
            "heldout": tmp_path / "chunks",
            "db": tmp_path / "mlflow.db",
            "artifacts": tmp_path / "artifacts",
            "work": tmp_path / f"{name}-work",
            "out": tmp_path / name,
            "csv": tmp_path / f"{name}.csv",
        }.items():
            command += [f"--{flag}", str(place)]
        env = {**os.environ, "PYTHONPATH": str(tiny.ROOT / "src"), "OMP_NUM_THREADS": "1"}
        env.pop("DVC_ROOT", None)
        return subprocess.Popen(command, env=env)

    def losses(name: str) -> list[tuple[str, str]]:
        with (tmp_path / f"{name}.csv").open(encoding="utf-8") as file:
            return [(row["step"], row["loss"]) for row in csv.DictReader(file)]

    whole = start("whole")
    reached = 0
    for _ in range(3):
        process = start("killed")
        until = time.monotonic() + WAIT_SECONDS
        while len(found := sorted((tmp_path / "killed-work").rglob("step-*.sha256"))) == 0 or (
            int(found[-1].name[5:14]) < reached + 20
        ):
            assert process.poll() is None, "the training was over before it was killed"
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached = int(found[-1].name[5:14])
    assert start("killed").wait(WAIT_SECONDS) == 0
    assert whole.wait(WAIT_SECONDS) == 0
    assert losses("killed") == losses("whole")
    assert len(losses("whole")) > reached
    assert engine.content(tmp_path / "killed") == engine.content(tmp_path / "whole")
    assert not list((tmp_path / "killed-work").rglob("*.pt"))
