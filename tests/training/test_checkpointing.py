"""A killed training run is resumed: its log and its weights are those of an undisturbed run."""

import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from boltlm.fingerprint import hash_path
from boltlm.timing import read_timing
from boltlm.training import checkpointing
from boltlm.training.checkpointing import PREDECAY_FILE, CheckpointManager
from boltlm.training.metrics_logger import MetricsLogger
from tests import tiny
from tests.training.harness import (
    NUM_STEPS,
    TrainStage,
    column,
    raw_run_params,
    read_log,
    same_weights,
    train,
    write_random_chunks,
)


class KilledError(Exception):
    pass


def train_and_kill(after_step: int, config: Any, csv_path: Path, work: Path) -> None:
    """Train, and end like a killed process: after the step, before its checkpoint."""
    add = MetricsLogger.add

    def killing_add(self: MetricsLogger, *args: Any, **named: Any) -> None:
        add(self, *args, **named)
        if self.step == after_step:
            raise KilledError

    MetricsLogger.add = killing_add
    try:
        with pytest.raises(KilledError):
            train(config, csv_path, work)
    finally:
        MetricsLogger.add = add


def saved_steps(folder: Path) -> list[int]:
    return [int(path.stem.removeprefix("step-")) for path in sorted(folder.rglob("step-*.pt"))]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_a_resumed_run_is_the_same_bit_for_bit(
    optimizer: str, every: int, killed_after: int, tmp_path: Path
) -> None:
    """A lost moment, learning rate, sequence or partial sum of losses would change the end."""
    config = tiny.train_config(optimizer=optimizer, checkpoint_every=every, log_every=2)
    undisturbed, expected_result = train(config, tmp_path / "undisturbed.csv")
    train_and_kill(killed_after, config, tmp_path / "a.csv", tmp_path / "work")
    resumed, result = train(config, tmp_path / "a.csv", tmp_path / "work")
    assert same_weights(undisturbed, resumed)
    assert result == expected_result
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "undisturbed.csv").read_bytes()


def test_a_resumed_run_trains_only_the_remaining_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the last checkpoint of a finished run leaves nothing to train."""
    config = tiny.train_config(checkpoint_every=2)
    train_and_kill(5, config, tmp_path / "a.csv", tmp_path / "work")
    train(config, None, tmp_path / "work")
    assert "resuming after step 4" in capsys.readouterr().err
    train(config, tmp_path / "a.csv", tmp_path / "work")
    assert "resuming after step 6" in capsys.readouterr().err
    assert column(read_log(tmp_path / "a.csv"), "step") == [1, 2, 3, 4, 5, 6]


def test_wall_clock_figures_survive_a_kill(tmp_path: Path) -> None:
    """The timing file of a resumed run has all lines, and the line logger receives those from
    before the kill again."""
    config = tiny.train_config(checkpoint_every=2)
    csv_path, timing_path = tmp_path / "a.csv", tmp_path / "a.json"
    train_and_kill(5, config, csv_path, tmp_path / "work")
    sent: list[dict[str, float]] = []
    train(
        config,
        csv_path,
        tmp_path / "work",
        timing_path=timing_path,
        line_logger=lambda line: sent.append(dict(line)),
    )
    timings = read_timing(timing_path, csv_path)
    assert column(timings, "step") == [1, 2, 3, 4, 5, 6]
    log = read_log(csv_path)
    assert sent == [line | timing for line, timing in zip(log, timings, strict=True)]


@pytest.mark.parametrize("corrupt", [False, True])
def test_the_state_before_the_decay_survives_a_kill(corrupt: bool, tmp_path: Path) -> None:
    """A run that is killed during its decay still publishes the state before it; where that file is
    corrupt, the run resumes from a checkpoint before the decay."""
    schedule = tiny.schedule(kind="wsd", decay_fraction=0.5)
    config = tiny.train_config(checkpoint_every=2, schedule=schedule)
    undisturbed, _ = train(config, None, tmp_path / "undisturbed")
    train_and_kill(5, config, tmp_path / "a.csv", tmp_path / "work")
    path = tmp_path / "work" / "run" / PREDECAY_FILE
    if corrupt:
        path.write_bytes(path.read_bytes()[:-10])
    resumed, _ = train(config, None, tmp_path / "work")
    assert same_weights(undisturbed, resumed)
    expected = checkpointing.read_state(tmp_path / "undisturbed" / "run" / PREDECAY_FILE)
    state = checkpointing.read_state(path)
    assert state["steps"] == expected["steps"] == 3
    for name, weight in expected["model"].items():
        assert torch.equal(state["model"][name], weight)


def test_a_corrupt_checkpoint_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are two checkpoints, and the last one is cut short, as after a power failure."""
    config = tiny.train_config(checkpoint_every=1)
    undisturbed, _ = train(config, tmp_path / "undisturbed.csv")
    train_and_kill(5, config, tmp_path / "a.csv", tmp_path / "work")
    assert saved_steps(tmp_path / "work") == [3, 4]
    last = sorted((tmp_path / "work").rglob("step-*.pt"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    resumed, _ = train(config, tmp_path / "a.csv", tmp_path / "work")
    messages = capsys.readouterr().err
    assert "step-000000004.pt is corrupt" in messages
    assert "resuming after step 3" in messages
    assert same_weights(undisturbed, resumed)


@pytest.mark.parametrize("corrupt", [False, True])
def test_unusable_checkpoints_are_removed(corrupt: bool, tmp_path: Path) -> None:
    """Otherwise they, being the newest, would stay while every new one is removed. The partial file
    of a killed process is removed as well."""
    checkpoints = CheckpointManager(tmp_path, 1, "tests")
    for step in (4, 5):
        checkpoints.save(step, {"steps": step})
    (tmp_path / ".step-6.pt.77").write_bytes(b"partial")
    if corrupt:
        for path in tmp_path.glob("*.pt"):
            path.write_bytes(b"corrupt")
        assert checkpoints.load_latest() is None
    else:  # after the decay, while the state before the decay is missing
        assert checkpoints.load_latest(decay_start=3) is None
    assert not list(tmp_path.iterdir())
    for step in (1, 2):
        checkpoints.save(step, {"steps": step})
    assert saved_steps(tmp_path) == [1, 2]
    assert checkpoints.load_latest() == {"steps": 2}


def test_a_write_error_of_the_log_does_not_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is reported once; at the end, when the disk has space again, the file has every line."""
    logger = MetricsLogger(
        tmp_path / "a.csv", every=1, ideal_seconds_per_token=0.0, peak_memory_mib=lambda: 1.0
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with logger:
        for step in range(6):
            if step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
            logger.add(10, 2.0, positions=10, lr=0.1, grad_norm=1.0, validation={}, last=False)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.count("will be written at the end of training") == 1
    assert column(read_log(tmp_path / "a.csv"), "step") == [1, 2, 3, 4, 5, 6]


def test_a_write_error_of_a_checkpoint_does_not_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is reported, the older checkpoint stays, and no partial file does."""
    checkpoints = CheckpointManager(tmp_path, 1, "tests")
    checkpoints.save(1, {"steps": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        checkpoints.save(2, {"steps": 2, "model": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "no checkpoint at step 2" in capsys.readouterr().err
    assert checkpoints.load_latest() == {"steps": 1}
    assert len(list(tmp_path.iterdir())) == 2  # the checkpoint and its checksum


def test_a_finished_run_leaves_no_checkpoints(tmp_path: Path) -> None:
    """The work folders of many runs would fill the disk."""
    checkpoints = CheckpointManager(tmp_path / "run", 1, "tests")
    for step in range(1, NUM_STEPS):
        checkpoints.save(step, {"steps": step})
    assert len(saved_steps(tmp_path)) == checkpointing.MAX_CHECKPOINTS
    checkpoints.clear()
    assert not checkpoints.folder.exists()
    assert checkpoints.load_latest() is None


def kill_after(stage: TrainStage, name: str, step: int) -> int:
    """Start the stage, kill it when it has a checkpoint of `step` or a later one; returns the step
    of that checkpoint."""
    process = stage.start(name)
    while True:
        checksums = sorted((stage.folder / f"{name}-work").rglob("step-*.sha256"))
        saved = int(checksums[-1].name[5:14]) if checksums else 0
        if saved >= step:
            break
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return saved


def test_the_stage_survives_sigkill(base_folder: Path, tmp_path: Path) -> None:
    """Three kills at different steps; then the log and the bytes of the model and of its snapshots
    are those of a run that was not disturbed, and the work folder holds no checkpoint."""
    chunks = write_random_chunks(tmp_path / "chunks", documents=1200, tokens=60, max_id=200)
    budget = {"kind": "epochs", "amount": 1}
    options = {"batch_size": 2, "log_every": 1, "checkpoint_every": 5}
    snapshots = {"every": 7, "precision": "bfloat16"}
    params = raw_run_params(budget, 64, **options, snapshots=snapshots)
    stage = TrainStage(tmp_path, base_folder, chunks, params)
    undisturbed = stage.start("undisturbed")
    last_step = 0
    for _ in range(3):
        last_step = kill_after(stage, "killed", last_step + 20)
    log = stage.run("killed")
    assert undisturbed.wait() == 0
    assert log == read_log(tmp_path / "undisturbed.csv")
    assert len(log) > last_step
    for part in ("", "-snapshots"):
        assert hash_path(tmp_path / f"killed{part}") == hash_path(tmp_path / f"undisturbed{part}")
    assert len(list((tmp_path / "killed-snapshots").iterdir())) == -(-len(log) // 7)
    assert not list((tmp_path / "killed-work").rglob("*.pt"))
