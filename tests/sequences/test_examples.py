"""Examples become rows with the loss on completions alone; training on them is a plain loop."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from boltlm.errors import UserError
from boltlm.model.curve import Curve
from boltlm.model.resume import Checkpoints
from boltlm.model.schedules import learning_rate
from boltlm.model.settings import TrainConfig
from boltlm.model.training import Trained, train
from boltlm.sequences.examples import Example, Examples
from boltlm.sequences.packing import IGNORED
from tests import tiny

VOCABULARY, COUNT, EPOCHS, SEED, BATCH = 30, 7, 3, 4, 4  # the last step has one row
STEPS = -(-COUNT * EPOCHS // BATCH)
Pair = tuple[tuple[int, ...], tuple[int, ...]]


def made(count: int = COUNT) -> list[Example]:
    """Of every length, with 0, the padding's id, among their ids; the first and the second of each
    four have the same prompt, and one prompt and one completion are a single token."""
    draw = np.random.default_rng(1)
    lengths = [(1, 3), (1, 5), (6, 1), (4, 9)]
    found: list[Example] = []
    for place in range(count):
        prompt, completion = lengths[place % 4]
        ids = [*range(prompt), *draw.integers(0, VOCABULARY, completion).tolist()]
        found.append(Example(ids[:prompt], ids[prompt:]))
    return found


def told(rows: Examples, count: int = BATCH) -> list[Pair]:
    """Prompt and completion of every row of all batches, read off inputs and labels alone."""
    found: list[Pair] = []
    for step in range(-(-len(rows) // count)):
        for inputs, labels in zip(*rows.batch(step, count), strict=True):
            (known,) = np.nonzero(labels != IGNORED)
            first, last = int(known[0]), int(known[-1])
            assert known.tolist() == list(range(first, last + 1)), "a gap in a completion"
            assert inputs[first + 1 : last + 1].tolist() == labels[first:last].tolist()
            assert not inputs[last + 1 :].any()
            found.append((tuple(inputs[: first + 1].tolist()), tuple(labels[known].tolist())))
    return found


def pairs(examples: list[Example]) -> list[Pair]:
    return [(tuple(one.prompt), tuple(one.completion)) for one in examples]


def test_a_batch_says_the_examples_back() -> None:
    """A label off by one, one on the prompt or the padding, a lost first or last token of the
    completion: all would still train."""
    rows = Examples(made(), 1, SEED)
    assert sorted(told(rows)) == sorted(pairs(made()))
    inputs, labels = rows.batch(0, BATCH)
    assert inputs.shape == labels.shape == (BATCH, 4 + 9 - 1)
    assert inputs.dtype == labels.dtype == np.int64


def test_each_epoch_has_every_example_once_in_an_order_of_its_own() -> None:
    """From (seed, epoch) alone: one epoch more leaves those before as they were."""
    examples = made(40)
    three = told(Examples(examples, 3, SEED))
    epochs = [three[start : start + 40] for start in (0, 40, 80)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(pairs(examples))] * 3
    orders = {tuple(order) for order in (*epochs, pairs(examples))}
    assert len(orders) == 4, "an epoch repeats an order"
    assert told(Examples(examples, 2, SEED)) == three[:80]
    assert told(Examples(examples, 1, SEED + 1)) not in epochs


@pytest.mark.parametrize("count", [1, 3, 4, 21, 100])
def test_the_tokens_left_are_the_labels_left(count: int) -> None:
    """Of every step on, whatever the batch: the curve and the time left are counted in them; the
    last step has the rows that are left, as padding rows would have no label at all."""
    rows = Examples(made(), EPOCHS, SEED)
    steps = -(-len(rows) // count)
    labels = [rows.batch(step, count)[1] for step in range(steps)]
    assert [len(one) for one in labels[:-1]] == [count] * (steps - 1)
    assert len(labels[-1]) == COUNT * EPOCHS - count * (steps - 1)
    for step in range(steps + 1):
        left = sum(int((one != IGNORED).sum()) for one in labels[step:])
        assert rows.predicted(step, count) == left


def test_nothing_to_train_on_is_said() -> None:
    """And not found out as an empty maximum."""
    with pytest.raises(UserError, match="no example to train on"):
        Examples([], 1, SEED)


def llama() -> LlamaForCausalLM:
    return tiny.llama(2, vocabulary=VOCABULARY, width=16)


def run(config: TrainConfig, work: Path) -> tuple[LlamaForCausalLM, Trained]:
    model = llama()
    trained = train(
        model,
        Examples(made(), EPOCHS, SEED),
        config,
        seed=SEED,
        csv_path=work / "curve.csv",
        what="tests",
        kept=Checkpoints(work / "steps", config.checkpoint_every, "tests"),
    )
    return model, trained


def plain(config: TrainConfig) -> tuple[LlamaForCausalLM, list[float]]:
    """Model and losses of a loop by the book: an example at a time, so without padding, and each
    token of a completion behind all that stands before it."""
    model, losses = llama().train(), []
    order = Examples(made(), EPOCHS, SEED).order
    stepper = torch.optim.AdamW(
        model.parameters(), betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    for step in range(STEPS):
        rate = learning_rate(config.schedule, config.learning_rate, step, STEPS)
        stepper.param_groups[0]["lr"] = rate
        logs: list[torch.Tensor] = []
        for row in order[step * BATCH : (step + 1) * BATCH]:
            one = made()[row]
            ids = torch.tensor([*one.prompt, *one.completion])
            log_LV = model(ids[None]).logits[0].log_softmax(-1)
            logs += [log_LV[at - 1, ids[at]] for at in range(len(one.prompt), len(ids))]
        loss = -torch.stack(logs).mean()
        stepper.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        stepper.step()
        losses.append(loss.item())
    return model, losses


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Each step's loss, with all its digits, as the training goes on."""
    found: list[float] = []
    add = Curve.add

    def listening(self: Curve, tokens: int, loss: float, **named: Any) -> None:
        found.append(loss)
        add(self, tokens, loss, **named)

    monkeypatch.setattr(Curve, "add", listening)
    return found


@pytest.mark.parametrize(("micro_rows", "clip_norm"), [(None, 0.5), (2, 100.0)])
def test_training_is_a_plain_loop(
    micro_rows: int | None, clip_norm: float, losses: list[float], tmp_path: Path
) -> None:
    """A mean over rows in place of tokens, padding that is seen, a loss on prompts, or a last
    short step that is weighed like a full one: only the numbers tell. A gradient that is always
    clipped would hide how it was scaled."""
    config = tiny.train_config(batch_rows=BATCH, micro_rows=micro_rows, clip_norm=clip_norm)
    model, trained = run(config, tmp_path)
    wanted, curve = plain(config)
    np.testing.assert_allclose(losses, curve, atol=1e-5)
    torch.testing.assert_close(weights(model), weights(wanted), atol=1e-4, rtol=1e-3)
    assert curve[-1] < curve[0] - 0.2, "nothing is learnt"
    tokens = EPOCHS * sum(len(one.completion) for one in made())
    assert trained == Trained(STEPS, tokens, None)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("steps", [1, 3, STEPS])
def test_a_killed_training_goes_on_to_the_same_weights(
    steps: int, losses: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies behind a step, before its checkpoint: with a row, a moment or an order lost, the
    rest would differ."""
    config = tiny.train_config(batch_rows=BATCH, checkpoint_every=2)
    whole, facts = run(config, tmp_path / "whole")
    wanted, listening = list(losses), Curve.add
    losses.clear()

    def dying(self: Curve, *args: Any, **named: Any) -> None:
        listening(self, *args, **named)
        if len(losses) == steps:
            raise KilledError

    monkeypatch.setattr(Curve, "add", dying)
    with pytest.raises(KilledError):
        run(config, tmp_path / "killed")
    monkeypatch.setattr(Curve, "add", listening)
    kept = (steps - 1) // config.checkpoint_every * config.checkpoint_every
    model, again = run(config, tmp_path / "killed")
    assert torch.equal(weights(model), weights(whole))
    assert again == facts
    assert losses == [*wanted[:steps], *wanted[kept:]]
