"""Continual runs: each goes on from the state that its parent had before its decay."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from boltlm.errors import UserError
from boltlm.model import checkpoint, resume, runs
from boltlm.model.runs import MOMENTS
from boltlm.params import load
from boltlm.records import Chunk, write_shard
from boltlm.sequences import packing
from tests import tiny
from tests.model.test_training import plain, read

RATE, STEPS, ROWS = 0.01, 8, 4


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("continual")
    draw = np.random.default_rng(1)
    found = [
        Chunk(doc_id=f"d{d}", chunk=0, text="x", tokens=tuple(draw.integers(2, 200, 60).tolist()))
        for d in range(40)
    ]
    write_shard(folder / "00000.parquet", Chunk, found)
    return folder


def stage(chunks: Path, parent: Path, out: Path, seed: int, **changes: Any) -> Path:
    """One run of the chain, on rows in the seed's own order; returns its folder."""
    params = load(tiny.ROOT / "params.yaml")
    schedule = {"kind": "wsd", "warmup": 2, "decay_fraction": 0.25, "least_ratio": 0.1}
    params["train"] |= {"optimizer": "adamw", "precision": "float32", "batch_rows": ROWS}
    params["train"] |= {"learning_rate": RATE, "log_every": 1, "schedule": schedule, **changes}
    params["sequences"] |= {"length": 32, "layout": "document"}
    params["seed"] = seed
    entry = {"corpus": "em", "data": "split/em", "format": "raw", "mix_raw": 0, "train": {}}
    entry["mix_corpus"] = "em"
    budget = {"kind": "steps", "amount": STEPS}
    params["models"] = {"arm": {**entry, "parent": "base", "budget": budget}}
    paths = runs.Paths(parent, chunks, chunks, chunks, out / "work", out, out.with_suffix(".csv"))
    runs.run(params, "arm", paths)
    return out


def batches(tmp_path: Path, chunks: Path, base: Path, seed: int) -> list[Any]:
    """What `stage` trains on, found again without it."""
    with pytest.MonkeyPatch.context() as patch:
        kept: list[Any] = []

        def seize(_: Any, rows: packing.Rows, *_args: Any, **_more: Any) -> None:
            kept.extend(rows.batch(step, ROWS) for step in range(STEPS))
            raise InterruptedError

        patch.setattr(runs, "train", seize)
        with pytest.raises(InterruptedError):
            stage(chunks, base, tmp_path / f"seized-{seed}", seed)
    return kept


def test_a_chain_is_one_long_run_up_to_the_last_decay(
    chunks: Path, base_folder: Path, tmp_path: Path
) -> None:
    """Three runs; then a plain loop over all their steps before a decay, at the constant rate
    behind one warm-up, and through the last decay: the same weights before it and at the end."""
    folder = base_folder
    for seed in (1, 2, 3):
        folder = stage(chunks, folder, tmp_path / f"c{seed}", seed)
    stable = STEPS * 3 // 4
    seen = [batches(tmp_path, chunks, base_folder, seed) for seed in (1, 2, 3)]
    every = [batch for found in seen for batch in found[:stable]] + seen[2][stable:]
    fall = [RATE * (1 - 0.9 * half) for half in (0.0, 0.5)]
    rates = [RATE / 3, RATE * 2 / 3] + [RATE] * (3 * stable - 2) + fall
    config = tiny.train_config(weight_decay=0.01, batch_rows=ROWS)
    long = {"batches": every, "rates": rates}
    for place, steps in (("predecay", 3 * stable), ("final", None)):
        wanted, curve = plain(config, steps, model=checkpoint.load(base_folder), **long)
        found = checkpoint.load(folder / place)
        for one, other in zip(found.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    lines = read(tmp_path / "c3.csv")
    assert [line["step"] for line in lines] == list(range(2 * stable + 1, 2 * stable + 1 + STEPS))
    np.testing.assert_allclose([line["loss"] for line in lines], [a for a, _ in curve[-8:]], 1e-4)
    tokens = [facts["tokens"] for facts in map(facts_of, (folder / "predecay", folder / "final"))]
    assert tokens == [3 * stable * ROWS * 32, (2 * stable + STEPS) * ROWS * 32]


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text("utf-8"))


def test_a_cosine_starts_from_the_final_weights(
    chunks: Path, base_folder: Path, tmp_path: Path
) -> None:
    """With its own warm-up, its own moments and its own count of steps."""
    parent = stage(chunks, base_folder, tmp_path / "c1", 1)
    schedule = {"kind": "cosine", "warmup": 0, "decay_fraction": 0.25, "least_ratio": 0.1}
    out = stage(chunks, parent, tmp_path / "c2", 2, schedule=schedule, learning_rate=1e-12)
    assert not (out / "final").exists()
    assert facts_of(out)["steps"] == STEPS
    wanted, found = checkpoint.load(parent / "final"), checkpoint.load(out)
    for one, other in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)


def test_a_cosine_in_the_same_folder_leaves_nothing_of_the_chain(
    chunks: Path, base_folder: Path, tmp_path: Path
) -> None:
    """`final` and `predecay` of an earlier run would be taken for this one's."""
    out = stage(chunks, base_folder, tmp_path / "c1", 1)
    schedule = {"kind": "cosine", "warmup": 0, "decay_fraction": 0.25, "least_ratio": 0.1}
    stage(chunks, base_folder, tmp_path / "c1", 1, schedule=schedule)
    assert checkpoint.final(out) == out
    assert not (out / "predecay").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rate": 0.02}, r"learning_rate \(0.01 there, 0.02 here\)"),
        ({"optimizer": "muon", "beta2": 0.9}, r"optimizer \(adamw there, muon here\), beta2"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], told: str, chunks: Path, base_folder: Path, tmp_path: Path
) -> None:
    """Moments of another rate or optimiser would be taken for one's own without a word."""
    parent = stage(chunks, base_folder, tmp_path / "c1", 1)
    with pytest.raises(UserError, match=rf"predecay: cannot be gone on from.*{told}"):
        stage(chunks, parent, tmp_path / "c2", 2, **changes)


def test_moments_of_another_model_are_refused(
    chunks: Path, base_folder: Path, tmp_path: Path
) -> None:
    """A file that was put there by hand, of a wider model or of one with fewer layers."""
    parent = stage(chunks, base_folder, tmp_path / "c1", 1)
    path = parent / "predecay" / MOMENTS
    good = resume.read(path)
    name = "model.lm_head.weight"
    state = good["state"]
    wider = {**state, name: {**state[name], "exp_avg": torch.zeros(4, 4)}}
    resume.write(path, {**good, "state": wider})
    with pytest.raises(UserError, match=r"another model: model\.lm_head\.weight has \[4, 4\]"):
        stage(chunks, parent, tmp_path / "c2", 2)
    fewer = {key: value for key, value in state.items() if key != name}
    resume.write(path, {**good, "state": fewer})
    with pytest.raises(UserError, match=r"another model, it lacks model\.lm_head\.weight"):
        stage(chunks, parent, tmp_path / "c3", 2)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"optimizer\.pt is torn"):
        stage(chunks, parent, tmp_path / "c4", 2)


def test_too_few_steps_for_the_schedule_are_an_error(
    chunks: Path, base_folder: Path, tmp_path: Path
) -> None:
    """A warm-up that runs into the decay leaves nothing to go on from."""
    schedule = {"kind": "wsd", "warmup": 7, "decay_fraction": 0.25, "least_ratio": 0.1}
    with pytest.raises(UserError, match="8 steps are too few"):
        stage(chunks, base_folder, tmp_path / "c1", 1, schedule=schedule)
