"""Training: the curve of a plain PyTorch loop, written out here."""

import csv
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedModel

from boltlm.errors import UserError
from boltlm.model.curve import COLUMNS
from boltlm.model.resume import Checkpoints
from boltlm.model.schedules import learning_rate
from boltlm.model.settings import During, TrainConfig, optimizers
from boltlm.model.training import Start, Trained, train
from boltlm.sequences.packing import IGNORED, Rows
from tests import tiny

VOCABULARY, LENGTH, SEED = 30, 12, 4


def data(count: int = 200, seed: int = 1) -> Rows:
    """17 rows, of which the last is padded: one step has fewer rows than the others."""
    stream = np.random.default_rng(seed).integers(0, VOCABULARY, size=count).astype(np.int32)
    stream[1::2] = (stream[0::2] + 1) % VOCABULARY  # something to learn
    return tiny.rows(stream, LENGTH, SEED)


def llama() -> LlamaForCausalLM:
    return tiny.llama(2, vocabulary=VOCABULARY, width=16)


def run(
    config: TrainConfig,
    path: Path | None,
    work: Path | None = None,
    *,
    model: PreTrainedModel | None = None,
    rows: Rows | None = None,
    start: Start | None = None,
    hook: Any = None,
) -> tuple[PreTrainedModel, Trained]:
    """Trains, in a work folder of its own where none is given; leaves the checkpoints there."""
    model = model or llama()
    folder = (work or Path(tempfile.mkdtemp())) / "run"
    trained = train(
        model,
        rows or data(),
        config,
        seed=SEED,
        csv_path=path,
        what="tests",
        kept=Checkpoints(folder, config.checkpoint_every, "tests"),
        start=start,
        hook=hook,
    )
    return model, trained


def read(path: Path) -> list[dict[str, float]]:
    with path.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return [{key: float(value) for key, value in line.items() if value} for line in lines]


def plain(
    config: TrainConfig,
    steps: int | None = None,
    *,
    model: PreTrainedModel | None = None,
    batches: list[tuple[np.ndarray, np.ndarray]] | None = None,
    rates: list[float] | None = None,
) -> tuple[PreTrainedModel, list[tuple[float, float]]]:
    """Model and (loss, gradient norm) of each step, by the book."""
    model, curve, rows = (model or llama()).train(), [], data()
    count = -(-len(rows) // config.batch_rows)
    batches = batches or [rows.batch(step, config.batch_rows) for step in range(count)]
    rates = rates or [
        learning_rate(config.schedule, config.learning_rate, step, count) for step in range(count)
    ]
    stepper = torch.optim.AdamW(
        model.parameters(),
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    for (inputs, labels), rate in list(zip(batches, rates, strict=True))[:steps]:
        stepper.param_groups[0]["lr"] = rate
        logits_BLV = model(torch.from_numpy(inputs)).logits
        labels_BL = torch.from_numpy(labels)
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
    model, trained = run(config, tmp_path / "a.csv")
    wanted_model, curve = plain(config)
    found = read(tmp_path / "a.csv")
    assert trained == Trained(len(curve), 199, None)
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
        assert list(found[0]) == [name for name in COLUMNS if not name.startswith("heldout")]
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


def test_a_loss_that_is_no_number_is_an_error() -> None:
    """Hours of training on NaN would end in a checkpoint of NaN."""
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"tests: loss is nan at step 1.*learning_rate"):
        run(tiny.train_config(), None, model=model)


def test_an_exploding_loss_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """It stops before the step that would spoil the weights, and says where the good ones are."""
    rate = tiny.schedule(kind="wsd", warmup=0, decay_fraction=0.2)
    config = tiny.train_config(learning_rate=40.0, schedule=rate, checkpoint_every=1)
    with pytest.raises(UserError, match=r"loss is \d+.* at step (\d).*checkpoint of step") as told:
        run(config, None, tmp_path)
    step = int(str(told.value).split(" at step ")[1].split()[0])
    found = Checkpoints(tmp_path / "run", 1, "tests").latest()
    assert found is not None
    assert found["steps"] == step - 1 > 0
    assert "of this run; the checkpoint of step" in str(told.value)
    assert all(torch.isfinite(weight).all() for weight in found["model"].values())


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
@pytest.mark.parametrize(
    "changes",
    [
        {"micro_rows": 1},
        {"micro_rows": 2},
        {"activation_checkpointing": True},
        pytest.param(
            {"compile": True},
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here"),
        ),
    ],
)
def test_how_it_is_carried_out_changes_no_number(changes: dict[str, Any], tmp_path: Path) -> None:
    """Micro-batches that average their means would weigh the padded row's tokens more."""
    run(tiny.train_config(), tmp_path / "a.csv")
    run(tiny.train_config(**changes), tmp_path / "b.csv")
    one, other = read(tmp_path / "a.csv"), read(tmp_path / "b.csv")
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [line[name] for line in one], [line[name] for line in other], rtol=2e-5, atol=1e-4
        )


def test_held_out_measures_stand_in_the_curve(tmp_path: Path) -> None:
    """Every so many steps and at the end, of the model in evaluation mode; the training goes on
    as if it had not been measured."""
    seen: list[bool] = []

    def hook(model: PreTrainedModel) -> dict[str, float]:
        seen.append(model.training)
        torch.manual_seed(0)
        return {"heldout_nll": float(len(seen))}

    during = During(every=4, documents=1, k_samples=1)
    measured, _ = run(tiny.train_config(evaluate=during), tmp_path / "a.csv", hook=hook)
    left_alone, _ = run(tiny.train_config(), tmp_path / "b.csv")
    found = {line["step"]: line.get("heldout_nll") for line in read(tmp_path / "a.csv")}
    assert found == {1: None, 2: None, 3: None, 4: 1.0, 5: None, 6: 2.0}
    assert seen == [False, False]
    for one, other in zip(measured.parameters(), left_alone.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "name",
    ["learning_rate", "clip_norm", "batch_rows", "micro_rows", "log_every", "checkpoint_every"],
)
def test_settings_must_be_positive(name: str) -> None:
    """Zero rows a step would divide by zero far from its cause."""
    for value in (0, math.nan):
        with pytest.raises(UserError, match=name):
            tiny.train_config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("beta2", 1.0), ("beta1", -0.1), ("epsilon", -1.0), ("weight_decay", -1.0)]
)
def test_an_optimisers_numbers_are_checked(name: str, value: float) -> None:
    """torch refuses them too, but with a traceback and after the corpus was packed."""
    with pytest.raises(UserError, match=name[:4]):
        tiny.train_config(**{name: value})
