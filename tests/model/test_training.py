"""Training: the curve of a plain PyTorch loop, written out here."""

import csv
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from boltlm.errors import UserError
from boltlm.model.schedules import learning_rate
from boltlm.model.training import COLUMNS, TrainConfig, optimizers, train
from boltlm.seeds import generator
from boltlm.sequences.packing import IGNORED, rows
from tests import tiny

VOCABULARY, LENGTH, SEED = 30, 12, 4


def data(count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """17 rows, of which the last is padded: one step has fewer rows than the others."""
    stream = np.random.default_rng(1).integers(0, VOCABULARY, size=count).astype(np.int32)
    stream[1::2] = (stream[0::2] + 1) % VOCABULARY  # something to learn
    return rows(stream, LENGTH)


def llama() -> LlamaForCausalLM:
    return tiny.llama(2, vocabulary=VOCABULARY, width=16)


def run(
    config: TrainConfig, path: Path | None, work: Path | None = None
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Trains, in a work folder of its own where none is given; leaves the checkpoints there."""
    model = llama()
    inputs_RL, labels_RL = data()
    work = work or Path(tempfile.mkdtemp())
    facts, _ = train(
        model, inputs_RL, labels_RL, config, seed=SEED, csv_path=path, what="tests", work=work
    )
    return model, facts


def read(path: Path) -> list[dict[str, float]]:
    with path.open(encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def plain(config: TrainConfig) -> tuple[LlamaForCausalLM, list[tuple[float, float]]]:
    """Model and (loss, gradient norm) of each step, by the book."""
    model, curve = llama().train(), []
    inputs_RL, labels_RL = (torch.from_numpy(array) for array in data())
    stepper = torch.optim.AdamW(
        model.parameters(),
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    order = torch.from_numpy(generator(SEED, "rows").permutation(len(inputs_RL)))
    steps = math.ceil(len(order) / config.batch_rows)
    for step in range(steps):
        stepper.param_groups[0]["lr"] = learning_rate(
            config.schedule, config.learning_rate, step, steps
        )
        batch = order[step * config.batch_rows : (step + 1) * config.batch_rows]
        logits_BLV, labels_BL = model(inputs_RL[batch]).logits, labels_RL[batch]
        known = labels_BL != IGNORED
        loss = cross_entropy(logits_BLV[known], labels_BL[known])
        stepper.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        stepper.step()
        curve.append((loss.item(), norm.item()))
    return model, curve


def test_the_curve_is_a_plain_loops(tmp_path: Path) -> None:
    """Labels shifted twice, a loss over padding, a missed clip or a wrong rate would all still
    `train`; only the numbers tell."""
    config = tiny.train_config(clip_norm=0.5)
    model, facts = run(config, tmp_path / "a.csv")
    wanted_model, curve = plain(config)
    found = read(tmp_path / "a.csv")
    assert facts == {"steps": len(curve), "tokens": 199}
    assert [row["step"] for row in found] == list(range(1, len(curve) + 1))
    np.testing.assert_allclose([row["loss"] for row in found], [a for a, _ in curve], atol=1e-4)
    np.testing.assert_allclose(
        [row["grad_norm"] for row in found], [b for _, b in curve], rtol=1e-3, atol=1e-4
    )
    rates = [learning_rate(config.schedule, 0.01, step, len(curve)) for step in range(len(curve))]
    np.testing.assert_allclose([row["lr"] for row in found], rates, rtol=1e-5)
    assert max(b for _, b in curve) > 0.5, "nothing was clipped"
    assert found[-1]["loss"] < found[0]["loss"]
    for one, other in zip(model.parameters(), wanted_model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert not model.training


def test_the_log_accounts_for_every_token(tmp_path: Path) -> None:
    """Whatever `log_every`: the last line has all steps and tokens, and losses weighed by their
    tokens add up to the same sum."""
    sums = []
    for every in (1, 4, 100):
        path = tmp_path / f"{every}.csv"
        run(tiny.train_config(log_every=every), path)
        found = read(path)
        assert list(found[0]) == list(COLUMNS)
        assert found[-1]["tokens"] == 199
        assert found[-1]["step"] == 6
        assert len(found) == math.ceil(6 / every)
        tokens = np.diff([0, *(row["tokens"] for row in found)])
        sums.append(float((tokens * [row["loss"] for row in found]).sum()))
    assert sums == pytest.approx([sums[0]] * 3, abs=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_seed_gives_one_model(optimizer: str) -> None:
    """A result that can't be made again is no result; bit for bit on one machine."""
    config = tiny.train_config(optimizer=optimizer)
    (one, _), (other, _) = run(config, None), run(config, None)
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name], rtol=0, atol=0)
    start = llama().state_dict()
    assert all(not torch.equal(weight, start[name]) for name, weight in one.state_dict().items())


def test_muon_takes_the_layers_matrices_and_adamw_the_rest() -> None:
    """Every parameter is stepped once, by the optimiser that is meant for it."""
    model = llama()
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def taken(optimizer: torch.optim.Optimizer) -> set[str]:
        return {names[id(p)] for group in optimizer.param_groups for p in group["params"]}

    rest, matrices = map(taken, optimizers(model, tiny.train_config(optimizer="muon")))
    assert rest | matrices == set(names.values())
    assert not rest & matrices
    assert matrices == {
        name for name in names.values() if ".layers." in name and "norm" not in name
    }
    (everything,) = map(taken, optimizers(model, tiny.train_config()))
    assert everything == set(names.values())


def test_a_loss_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    """Hours of training on NaN would end in a checkpoint of NaN."""
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    inputs_RL, labels_RL = data()
    with pytest.raises(UserError, match=r"tests: loss is nan at step 1.*learning_rate"):
        train(
            model,
            inputs_RL,
            labels_RL,
            tiny.train_config(),
            seed=SEED,
            csv_path=tmp_path / "a.csv",
            what="tests",
            work=tmp_path,
        )


@pytest.mark.parametrize(
    "name", ["learning_rate", "clip_norm", "batch_rows", "log_every", "checkpoint_every"]
)
def test_settings_must_be_positive(name: str) -> None:
    """Zero rows a step would divide by zero far from its cause."""
    with pytest.raises(UserError, match=name):
        tiny.train_config(**{name: 0})
