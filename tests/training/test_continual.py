"""Continual runs: each continues from the state that its parent saved before its decay."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from boltlm import checkpoint
from boltlm.errors import UserError
from boltlm.params import build_settings
from boltlm.sequences.packing import PackedDataset
from boltlm.training import checkpointing, job
from boltlm.training.config import TrainSettings
from boltlm.training.continual import OPTIMIZER_FILE
from boltlm.training.run import TrainPaths, run_training
from boltlm.training.trainer import Trainer
from tests import tiny
from tests.training.harness import (
    Batch,
    column,
    plain_loop,
    raw_run_params,
    read_log,
    same_weights,
    write_random_chunks,
)

RATE, STEPS, BATCH_SIZE, SEQUENCE_LENGTH = 0.01, 8, 4, 32
COSINE = {"kind": "cosine", "warmup": 0, "decay_fraction": 0.25, "min_lr_ratio": 0.1}
WSD = {"kind": "wsd", "warmup": 2, "decay_fraction": 0.25, "min_lr_ratio": 0.1}


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("continual")
    return write_random_chunks(folder, documents=40, tokens=60, max_id=200)


def train_run(chunks: Path, parent: Path, out: Path, seed: int, **changes: Any) -> Path:
    """One run of the chain, by default with the schedule `wsd`; its data are in the order of the
    seed. `changes`: to the section `train`. Returns the model folder."""
    train = {"optimizer": "adamw", "precision": "float32", "batch_size": BATCH_SIZE}
    train |= {"learning_rate": RATE, "log_every": 1, "schedule": WSD, **changes}
    budget = {"kind": "steps", "amount": STEPS}
    params = raw_run_params(budget, SEQUENCE_LENGTH, **train) | {"seed": seed}
    reports = out.with_suffix(".csv"), out.with_suffix(".timing"), out.with_suffix(".json")
    snapshots = out.with_suffix(".snapshots")
    run_training(
        build_settings(TrainSettings, params, name="arm"),
        TrainPaths(parent, chunks, chunks, chunks, out / "work", out, *reports, snapshots),
    )
    return out


def batches_of_run(
    tmp_path: Path, chunks: Path, base: Path, seed: int, batch_size: int = BATCH_SIZE
) -> list[Batch]:
    """The batches that `train_run` trains on."""
    batches: list[Batch] = []

    def record(_: Any, dataset: PackedDataset, *_args: Any, **_named: Any) -> None:
        batches.extend(dataset.batch(step, batch_size) for step in range(STEPS))
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "train_model", record)
        with pytest.raises(InterruptedError):
            train_run(chunks, base, tmp_path / f"recorded-{seed}", seed, batch_size=batch_size)
    return batches


def read_facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text("utf-8"))


def test_a_chain_equals_one_long_run_with_a_single_decay(
    chunks: Path, base_folder: Path, tmp_path: Path
) -> None:
    """Three runs, compared with a plain loop over all their steps before a decay, at the constant
    rate after one warm-up, and then through the last decay: the same weights before the decay and
    at the end."""
    folder = base_folder
    for seed in (1, 2, 3):
        folder = train_run(chunks, folder, tmp_path / f"c{seed}", seed)
    stable = STEPS * 3 // 4
    recorded = [batches_of_run(tmp_path, chunks, base_folder, seed) for seed in (1, 2, 3)]
    batches = [batch for run_batches in recorded for batch in run_batches[:stable]]
    batches += recorded[2][stable:]
    decay = [RATE * (1 - 0.9 * fraction) for fraction in (0.0, 0.5)]
    rates = [RATE / 3, RATE * 2 / 3] + [RATE] * (3 * stable - 2) + decay
    config = tiny.train_config(weight_decay=0.01, batch_size=BATCH_SIZE)
    losses: list[float] = []
    for name, steps in (("predecay", 3 * stable), ("final", None)):
        start = checkpoint.load_model(base_folder)
        expected, losses, _ = plain_loop(config, steps, model=start, batches=batches, rates=rates)
        model = checkpoint.load_model(folder / name)
        for weight, expected_weight in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(weight, expected_weight, atol=2e-5, rtol=1e-4)
    log = read_log(tmp_path / "c3.csv")
    assert column(log, "step") == list(range(2 * stable + 1, 2 * stable + 1 + STEPS))
    np.testing.assert_allclose(column(log, "loss"), losses[-STEPS:], 1e-4)
    tokens = [read_facts(folder / name)["tokens"] for name in ("predecay", "final")]
    batch_tokens = BATCH_SIZE * SEQUENCE_LENGTH
    assert tokens == [3 * stable * batch_tokens, (2 * stable + STEPS) * batch_tokens]


def test_the_batch_size_may_change_between_runs(
    chunks: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm start of half the batch, as the paper's: the same weights as of a plain loop over the
    small and then the large batches, and exactly the same after a kill and a resumption."""
    sizes = {1: BATCH_SIZE, 2: 2 * BATCH_SIZE}
    parent = train_run(chunks, base_folder, tmp_path / "c1", 1)
    doubled = {"batch_size": sizes[2], "checkpoint_every": 2}
    out = train_run(chunks, parent, tmp_path / "c2", 2, **doubled)
    stable = STEPS * 3 // 4
    recorded = [batches_of_run(tmp_path, chunks, base_folder, s, size) for s, size in sizes.items()]
    batches = [batch for run_batches in recorded for batch in run_batches[:stable]]
    assert {len(batch[0]) for batch in batches} == set(sizes.values())
    config = tiny.train_config(weight_decay=0.01)
    rates = [RATE / 3, RATE * 2 / 3] + [RATE] * (2 * stable - 2)
    start = checkpoint.load_model(base_folder)
    expected, _, _ = plain_loop(config, model=start, batches=batches, rates=rates)
    model = checkpoint.load_model(out / "predecay")
    for weight, expected_weight in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, expected_weight, atol=2e-5, rtol=1e-4)
    assert read_facts(out / "final")["batch_size"] == sizes[2]
    # The run is killed at its sixth step, after its checkpoint of the fourth, and started again.
    train_step = Trainer.train_step

    def killed(trainer: Trainer, step: int, *arguments: Any) -> tuple[float, int]:
        if step == 5:
            raise InterruptedError
        return train_step(trainer, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed)
        with pytest.raises(InterruptedError):
            train_run(chunks, parent, tmp_path / "killed", 2, **doubled)
    resumed = train_run(chunks, parent, tmp_path / "killed", 2, **doubled)
    for name in ("predecay", "final"):
        one, other = checkpoint.load_model(out / name), checkpoint.load_model(resumed / name)
        assert same_weights(one, other)


def test_a_cosine_run_starts_from_the_final_weights(
    chunks: Path, base_folder: Path, tmp_path: Path
) -> None:
    """With a warm-up, moments and a count of steps of its own."""
    parent = train_run(chunks, base_folder, tmp_path / "c1", 1)
    out = train_run(chunks, parent, tmp_path / "c2", 2, schedule=COSINE, learning_rate=1e-12)
    assert not (out / "final").exists()
    assert read_facts(out)["steps"] == STEPS
    expected, model = checkpoint.load_model(parent / "final"), checkpoint.load_model(out)
    for weight, expected_weight in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, expected_weight, atol=1e-7, rtol=1e-6)


def test_a_cosine_run_removes_an_earlier_wsd_run_from_its_folder(
    chunks: Path, base_folder: Path, tmp_path: Path
) -> None:
    """`final` and `predecay` of the earlier run would be taken for this run's."""
    out = train_run(chunks, base_folder, tmp_path / "c1", 1)
    train_run(chunks, base_folder, tmp_path / "c1", 1, schedule=COSINE)
    assert checkpoint.final_weights(out) == out
    assert not (out / "predecay").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.02}, r"learning_rate \(0.01 there, 0.02 here\)"),
        ({"optimizer": "muon", "beta2": 0.9}, r"optimizer \(adamw there, muon here\), beta2"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], message: str, chunks: Path, base_folder: Path, tmp_path: Path
) -> None:
    """The moments of another learning rate or optimizer would silently be used."""
    parent = train_run(chunks, base_folder, tmp_path / "c1", 1)
    with pytest.raises(UserError, match=rf"predecay: cannot be resumed from.*{message}"):
        train_run(chunks, parent, tmp_path / "c2", 2, **changes)


def test_moments_of_another_model_are_refused(
    chunks: Path, base_folder: Path, tmp_path: Path
) -> None:
    """A file that was copied from a wider model or from one with fewer layers, or a corrupt one."""
    parent = train_run(chunks, base_folder, tmp_path / "c1", 1)
    path = parent / "predecay" / OPTIMIZER_FILE
    moments = checkpointing.read_state(path)
    name, state = "model.lm_head.weight", moments["state"]
    wider = {**state, name: {**state[name], "exp_avg": torch.zeros(4, 4)}}
    checkpointing.write_state(path, {**moments, "state": wider})
    message = r"another model: model\.lm_head\.weight has the shape \[4, 4\]"
    with pytest.raises(UserError, match=message):
        train_run(chunks, parent, tmp_path / "c2", 2)
    fewer = {key: value for key, value in state.items() if key != name}
    checkpointing.write_state(path, {**moments, "state": fewer})
    with pytest.raises(UserError, match=r"another model: it lacks model\.lm_head\.weight"):
        train_run(chunks, parent, tmp_path / "c3", 2)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"optimizer\.pt is corrupt"):
        train_run(chunks, parent, tmp_path / "c4", 2)


def test_too_few_steps_for_the_schedule_are_an_error(
    chunks: Path, base_folder: Path, tmp_path: Path
) -> None:
    """A warm-up that reaches into the decay leaves no state to continue from."""
    with pytest.raises(UserError, match="8 steps are too few"):
        train_run(chunks, base_folder, tmp_path / "c1", 1, schedule={**WSD, "warmup": 7})
