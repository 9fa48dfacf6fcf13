"""The training loop, compared with a plain PyTorch loop; settings, log and validation."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from boltlm.errors import UserError
from boltlm.sequences.packing import IGNORE_INDEX, PackedDataset
from boltlm.timing import read_timing
from boltlm.training import distributed
from boltlm.training.checkpointing import CheckpointManager
from boltlm.training.config import ValidationConfig
from boltlm.training.gradients import accumulate_gradients
from boltlm.training.loss import CausalLMLoss
from boltlm.training.metrics_logger import TRAIN_COLUMNS
from boltlm.training.optimizer import build_optimizers
from boltlm.training.schedules import learning_rate
from boltlm.training.trainer import TrainResult
from tests import tiny
from tests.training import harness
from tests.training.harness import (
    NUM_STEPS,
    NUM_TARGETS,
    SEQUENCE_LENGTH,
    VOCAB_SIZE,
    Batch,
    column,
    make_model,
    plain_loop,
    read_log,
    same_weights,
    train,
)


def test_training_equals_a_plain_loop(tmp_path: Path) -> None:
    """Labels shifted twice, a loss on padding, missing clipping or a wrong learning rate: with any
    of these, training would still run; only the numbers show it."""
    config = tiny.train_config(max_grad_norm=0.5)
    model, result = train(config, tmp_path / "a.csv")
    expected_model, losses, norms = plain_loop(config)
    log = read_log(tmp_path / "a.csv")
    assert result == TrainResult(NUM_STEPS, NUM_TARGETS, None)
    assert column(log, "step") == list(range(1, NUM_STEPS + 1))
    np.testing.assert_allclose(column(log, "loss"), losses, atol=1e-4)
    np.testing.assert_allclose(column(log, "grad_norm"), norms, rtol=1e-3, atol=1e-4)
    rates = [learning_rate(config.schedule, 0.01, step, NUM_STEPS) for step in range(NUM_STEPS)]
    np.testing.assert_allclose(column(log, "lr"), rates, rtol=1e-5)
    assert max(norms) > 0.5, "no gradient was clipped"
    assert log[-1]["loss"] < log[0]["loss"]
    for weight, expected in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, atol=1e-4, rtol=1e-3)
    assert not model.training


def masked_dataset() -> tuple[PackedDataset, list[harness.Batch]]:
    """A stream with tokens without a loss, and its batches of three sequences, made by hand. The
    second batch has no token with a loss."""
    random = np.random.default_rng(2)
    stream = random.integers(0, VOCAB_SIZE, 15 * SEQUENCE_LENGTH + 1)
    masked = random.random(stream.shape) < 0.3
    masked[3 * SEQUENCE_LENGTH + 1 : 6 * SEQUENCE_LENGTH + 1] = True
    inputs_RL = stream[:-1].reshape(-1, SEQUENCE_LENGTH)
    labels_RL = np.where(masked, IGNORE_INDEX, stream)[1:].reshape(-1, SEQUENCE_LENGTH)
    tokens = np.where(masked, ~stream, stream).astype(np.int16)
    batches = [(inputs_RL[row : row + 3], labels_RL[row : row + 3]) for row in range(0, 15, 3)]
    return PackedDataset(tokens, SEQUENCE_LENGTH, np.arange(15), "tests"), batches


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_the_gradient_of_tokens_without_a_loss(micro_batch_size: int | None) -> None:
    """Loss and gradient are those of the mean cross-entropy over the other tokens."""
    dataset, batches = masked_dataset()
    inputs_BL, labels_BL = map(torch.from_numpy, batches[0])
    plain_model, model = make_model().train(), make_model().train()
    logits_BLV = plain_model(inputs_BL).logits
    expected = cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten())
    expected.backward()
    config = tiny.train_config(micro_batch_size=micro_batch_size)
    loss, tokens = accumulate_gradients(CausalLMLoss(model), dataset.batch(0, 3), config)
    assert tokens == int((labels_BL != IGNORE_INDEX).sum())
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    for weight, plain_weight in zip(model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, plain_weight.grad, atol=1e-6, rtol=1e-4)


def weighted_rows() -> tuple[Batch, list[tuple[Batch, float]]]:
    """A batch of five rows of two chunks with their loss weights ŵ, as `PackedDataset.batch`
    returns it, and each row alone without padding, with its ŵ."""
    random = np.random.default_rng(3)
    lengths, weights = (12, 7, 9, 5, 12), (0.5, 0.3, 0.2, 0.999, 0.001)
    inputs_BL = np.zeros((5, SEQUENCE_LENGTH), np.int64)
    labels_BL = np.full_like(inputs_BL, IGNORE_INDEX)
    weights_BL = np.zeros(inputs_BL.shape, np.float32)
    rows: list[tuple[Batch, float]] = []
    for row, (length, weight) in enumerate(zip(lengths, weights, strict=True)):
        ids = random.integers(0, VOCAB_SIZE, length + 1)
        inputs_BL[row, :length], labels_BL[row, :length] = ids[:-1], ids[1:]
        weights_BL[row, :length] = weight
        rows.append(((ids[None, :-1], ids[None, 1:]), weight))
    return (inputs_BL, labels_BL, weights_BL), rows


def weighted_gradient() -> tuple[float, list[torch.Tensor]]:
    """Loss and gradient Σ ŵ·(those of the row alone) over the number of all labels, in float64."""
    model = make_model().double().train()
    _, rows = weighted_rows()
    total = sum(labels.size for (_, labels), _ in rows)
    loss = 0.0
    for (inputs, labels), weight in rows:
        logits_BLV = model(torch.from_numpy(inputs)).logits
        targets = torch.from_numpy(labels).flatten()
        row_loss = cross_entropy(logits_BLV.flatten(0, 1), targets, reduction="sum")
        (row_loss * weight / total).backward()
        loss += row_loss.item() * weight / total
    return loss, [p.grad.float() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_the_gradient_of_weighted_rows(micro_batch_size: int | None) -> None:
    """docs/method.md, 3.5: with the weights ŵ it is that of Σ ŵ·loss over the rows of all latents,
    divided by the number of labels, in one micro-batch or in several."""
    model, (batch, _) = make_model().train(), weighted_rows()
    expected_loss, expected = weighted_gradient()
    config = tiny.train_config(micro_batch_size=micro_batch_size)
    loss, tokens = accumulate_gradients(CausalLMLoss(model), batch, config)
    assert tokens == 12 + 7 + 9 + 5 + 12
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for weight, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, grad, atol=1e-6, rtol=1e-4)


def test_weighted_rows_on_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of two processes' gradients, the second of which has a row of padding, is the
    gradient of one process."""
    batch, _ = weighted_rows()
    expected_loss, expected = weighted_gradient()
    models = [make_model().train() for _ in range(2)]
    loss = 0.0
    for index, model in enumerate(models):
        process = SimpleNamespace(num_processes=2, process_index=index)
        monkeypatch.setattr(distributed, "process_state", lambda process=process: process)
        monkeypatch.setattr(distributed, "process_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(distributed, "all_reduce_sum", lambda value: value)
        loss += accumulate_gradients(CausalLMLoss(model), batch, tiny.train_config())[0]
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for one, other, grad in zip(*(m.parameters() for m in models), expected, strict=True):
        torch.testing.assert_close((one.grad + other.grad) / 2, grad, atol=1e-6, rtol=1e-4)


def test_weights_of_one_change_nothing() -> None:
    """Bit for bit: a weighted run of chunks with one distinct latent each is the selected one."""
    (inputs, labels, weights), _ = weighted_rows()
    model, weighted_model = make_model().train(), make_model().train()
    config = tiny.train_config()
    result = accumulate_gradients(CausalLMLoss(model), (inputs, labels), config)
    weights = np.ones_like(weights)
    batch = (inputs, labels, weights)
    assert accumulate_gradients(CausalLMLoss(weighted_model), batch, config) == result
    for one, other in zip(model.parameters(), weighted_model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=0, rtol=0)


def test_a_run_with_tokens_without_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tokens with a loss are counted as trained on; a batch that has none leaves a line of
    zeros and finite weights."""
    dataset, batches = masked_dataset()
    monkeypatch.setattr(harness, "make_dataset", lambda: dataset)
    model, result = train(tiny.train_config(), tmp_path / "a.csv")
    log = read_log(tmp_path / "a.csv")
    tokens = np.cumsum([(labels_BL != IGNORE_INDEX).sum() for _, labels_BL in batches])
    assert column(log, "tokens") == tokens.tolist()
    assert result.tokens == tokens[-1]
    assert (log[1]["loss"], log[1]["grad_norm"]) == (0.0, 0.0)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_the_log_accounts_for_every_token(tmp_path: Path) -> None:
    """For any `log_every`, the last line has all steps and tokens, and the losses weighted by their
    tokens have the same sum."""
    sums = []
    for every in (1, 4, 100):
        path = tmp_path / f"{every}.csv"
        train(tiny.train_config(log_every=every), path)
        log = read_log(path)
        assert list(log[0]) == [name for name in TRAIN_COLUMNS if not name.startswith("val_")]
        assert log[-1]["tokens"] == NUM_TARGETS
        assert log[-1]["step"] == NUM_STEPS
        assert len(log) == math.ceil(NUM_STEPS / every)
        tokens = np.diff([0, *column(log, "tokens")])
        sums.append(float((tokens * column(log, "loss")).sum()))
    assert sums == pytest.approx([sums[0]] * 3, abs=1e-3)


def test_wall_clock_figures_are_kept_apart(tmp_path: Path) -> None:
    """The tracked log is reproducible; its wall-clock figures are in the timing file, one line for
    each of its lines, and the line logger receives both."""
    sent: list[dict[str, float]] = []
    csv_path, timing_path = tmp_path / "a.csv", tmp_path / "timings" / "a.json"
    train(
        tiny.train_config(log_every=2),
        csv_path,
        timing_path=timing_path,
        line_logger=lambda line: sent.append(dict(line)),
    )
    log, timings = read_log(csv_path), read_timing(timing_path, csv_path)
    assert column(log, "step") == column(timings, "step") == [2, 4, 6]
    names = {"step", "tokens_per_second", "mfu", "memory_mib", "seconds"}
    assert all(set(timing) == names for timing in timings)
    assert names & set(TRAIN_COLUMNS) == {"step"}
    assert sent == [line | timing for line, timing in zip(log, timings, strict=True)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_seed_determines_the_weights(optimizer: str) -> None:
    """Two runs with the same seed give the same weights, bit for bit on one machine."""
    config = tiny.train_config(optimizer=optimizer)
    (model, _), (repeated, _) = train(config, None), train(config, None)
    weights, repeated_weights = model.state_dict(), repeated.state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, repeated_weights[name], rtol=0, atol=0)
    start = make_model().state_dict()
    assert all(not torch.equal(weight, start[name]) for name, weight in weights.items())


def test_muon_updates_the_layer_matrices_and_adamw_the_others() -> None:
    """Every parameter is updated once, by the optimizer that is meant for it."""
    model = make_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def parameters(optimizer: torch.optim.Optimizer) -> set[str]:
        return {names[id(p)] for group in optimizer.param_groups for p in group["params"]}

    adamw, muon = map(parameters, build_optimizers(model, tiny.train_config(optimizer="muon")))
    assert adamw | muon == set(names.values())
    assert not adamw & muon
    assert muon == {name for name in names.values() if ".layers." in name and "norm" not in name}
    (adamw_only,) = map(parameters, build_optimizers(model, tiny.train_config()))
    assert adamw_only == set(names.values())


def test_a_loss_of_nan_is_an_error() -> None:
    """Hours of training would otherwise end in weights of NaN."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"tests: the loss is nan at step 1.*learning_rate"):
        train(tiny.train_config(), None, model=model)


def test_an_exploding_loss_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    """Training stops before the update that would ruin the weights, and the message says where the
    last good ones are."""
    schedule = tiny.schedule(kind="wsd", warmup=0, decay_fraction=0.2)
    config = tiny.train_config(learning_rate=40.0, schedule=schedule, checkpoint_every=1)
    message = r"loss is \d+.* at step (\d).*of this run; the checkpoint of step"
    with pytest.raises(UserError, match=message) as raised:
        train(config, None, tmp_path)
    step = int(str(raised.value).split(" at step ")[1].split()[0])
    state = CheckpointManager(tmp_path / "run", 1, "tests").load_latest()
    assert state is not None
    assert state["steps"] == step - 1 > 0
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())


@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 2},
        {"activation_checkpointing": True},
        pytest.param(
            {"compile": True},
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here"),
        ),
    ],
)
def test_execution_settings_do_not_change_the_numbers(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """Averaging the means of micro-batches, for example, would give the tokens of the padded
    sequence too much weight."""
    train(tiny.train_config(), tmp_path / "a.csv")
    train(tiny.train_config(**changes), tmp_path / "b.csv")
    log, changed_log = read_log(tmp_path / "a.csv"), read_log(tmp_path / "b.csv")
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            column(log, name), column(changed_log, name), rtol=2e-5, atol=1e-4
        )


def test_validation_metrics_are_in_the_log(tmp_path: Path) -> None:
    """Validation runs every few steps and at the end, with the model in evaluation mode; training
    continues as if there had been none."""
    training_modes: list[bool] = []

    def hook(model: PreTrainedModel) -> dict[str, float]:
        training_modes.append(model.training)
        torch.manual_seed(0)
        return {"val_nll": float(len(training_modes)), "val_elbo": math.nan}

    validation = ValidationConfig(every=4, documents=1, k_samples=1)
    config = tiny.train_config(validation=validation, log_every=5)
    model, _ = train(config, tmp_path / "a.csv", validation_hook=hook)
    model_without_validation, _ = train(tiny.train_config(), None)
    log = read_log(tmp_path / "a.csv")
    assert {line["step"]: line.get("val_nll") for line in log} == {4: 1.0, 5: None, 6: 2.0}
    assert not any("val_elbo" in line for line in log), "a value that is not finite is left blank"
    assert training_modes == [False, False]
    assert same_weights(model, model_without_validation)
