"""SFT examples become training sequences with the loss on completions; training on them is compared
with a plain loop.

Shape suffixes: L positions of a sequence, V vocabulary.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from boltlm.errors import UserError
from boltlm.sequences.packing import IGNORE_INDEX
from boltlm.sequences.sft import SFTDataset, SFTExample
from boltlm.training.checkpointing import CheckpointManager
from boltlm.training.config import TrainConfig
from boltlm.training.metrics_logger import MetricsLogger
from boltlm.training.schedules import learning_rate
from boltlm.training.trainer import TrainResult, train_model
from tests import tiny

VOCAB_SIZE, NUM_EXAMPLES, EPOCHS, SEED, BATCH_SIZE = 30, 7, 3, 4, 4  # the last batch has one
NUM_STEPS = -(-NUM_EXAMPLES * EPOCHS // BATCH_SIZE)
PromptAndCompletion = tuple[tuple[int, ...], tuple[int, ...]]


def make_examples(count: int = NUM_EXAMPLES) -> list[SFTExample]:
    """Examples of several lengths whose ids include 0, the id of padding. Of each four, the first
    two have the same prompt; some prompts and some completions have a single token."""
    random = np.random.default_rng(1)
    lengths = [(1, 3), (1, 5), (6, 1), (4, 9)]
    examples: list[SFTExample] = []
    for index in range(count):
        prompt, completion = lengths[index % 4]
        ids = [*range(prompt), *random.integers(0, VOCAB_SIZE, completion).tolist()]
        examples.append(SFTExample(ids[:prompt], ids[prompt:]))
    return examples


def read_back(dataset: SFTDataset, batch_size: int = BATCH_SIZE) -> list[PromptAndCompletion]:
    """Prompt and completion of every sequence of all batches, from inputs and labels alone."""
    pairs: list[PromptAndCompletion] = []
    for step in range(-(-len(dataset) // batch_size)):
        for inputs, labels in zip(*dataset.batch(step, batch_size), strict=True):
            (targets,) = np.nonzero(labels != IGNORE_INDEX)
            first, last = int(targets[0]), int(targets[-1])
            assert targets.tolist() == list(range(first, last + 1)), "a gap in a completion"
            assert inputs[first + 1 : last + 1].tolist() == labels[first:last].tolist()
            assert not inputs[last + 1 :].any()
            pairs.append((tuple(inputs[: first + 1].tolist()), tuple(labels[targets].tolist())))
    return pairs


def as_pairs(examples: list[SFTExample]) -> list[PromptAndCompletion]:
    return [(tuple(example.prompt), tuple(example.completion)) for example in examples]


def test_batches_hold_the_examples() -> None:
    """A label off by one, a label on the prompt or the padding, a lost first or last token of the
    completion: with any of these, training would still run."""
    dataset = SFTDataset(make_examples(), 1, SEED)
    assert sorted(read_back(dataset)) == sorted(as_pairs(make_examples()))
    inputs, labels = dataset.batch(0, BATCH_SIZE)
    assert inputs.shape == labels.shape == (BATCH_SIZE, 4 + 9 - 1)
    assert inputs.dtype == labels.dtype == np.int64


def test_each_epoch_has_every_example_once_in_its_own_order() -> None:
    """The order depends on (seed, epoch) alone: a further epoch leaves the earlier ones alone."""
    examples = make_examples(40)
    three_epochs = read_back(SFTDataset(examples, 3, SEED))
    epochs = [three_epochs[start : start + 40] for start in (0, 40, 80)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(as_pairs(examples))] * 3
    orders = {tuple(order) for order in (*epochs, as_pairs(examples))}
    assert len(orders) == 4, "an epoch repeats an order"
    assert read_back(SFTDataset(examples, 2, SEED)) == three_epochs[:80]
    assert read_back(SFTDataset(examples, 1, SEED + 1)) not in epochs


@pytest.mark.parametrize("batch_size", [1, 3, 4, 21, 100])
def test_num_target_tokens_counts_the_labels(batch_size: int) -> None:
    """From every step on, for any batch size: progress is measured in them. The last batch has only
    the sequences that remain, because sequences of padding would have no label at all."""
    dataset = SFTDataset(make_examples(), EPOCHS, SEED)
    num_steps = -(-len(dataset) // batch_size)
    labels = [dataset.batch(step, batch_size)[1] for step in range(num_steps)]
    assert [len(batch) for batch in labels[:-1]] == [batch_size] * (num_steps - 1)
    assert len(labels[-1]) == NUM_EXAMPLES * EPOCHS - batch_size * (num_steps - 1)
    for step in range(num_steps + 1):
        num_labels = sum(int((batch != IGNORE_INDEX).sum()) for batch in labels[step:])
        assert dataset.num_target_tokens(step, batch_size) == num_labels


def test_no_examples_are_an_error() -> None:
    """A clear one, rather than the maximum of an empty list."""
    with pytest.raises(UserError, match="no example to train on"):
        SFTDataset([], 1, SEED)


def make_model() -> LlamaForCausalLM:
    return tiny.llama(2, vocab_size=VOCAB_SIZE, hidden_size=16)


def train(config: TrainConfig, work: Path) -> tuple[LlamaForCausalLM, TrainResult]:
    model = make_model()
    result = train_model(
        model,
        SFTDataset(make_examples(), EPOCHS, SEED),
        config,
        seed=SEED,
        csv_path=work / "train.csv",
        what="tests",
        checkpoints=CheckpointManager(work / "steps", config.checkpoint_every, "tests"),
    )
    return model, result


def train_plainly(config: TrainConfig) -> tuple[LlamaForCausalLM, list[float]]:
    """Model and losses of a textbook loop: one example at a time, hence without padding, and each
    token of a completion conditioned on all tokens before it."""
    model, losses = make_model().train(), []
    order = SFTDataset(make_examples(), EPOCHS, SEED).order
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    for step in range(NUM_STEPS):
        rate = learning_rate(config.schedule, config.learning_rate, step, NUM_STEPS)
        optimizer.param_groups[0]["lr"] = rate
        log_probs: list[torch.Tensor] = []
        for index in order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]:
            example = make_examples()[index]
            ids = torch.tensor([*example.prompt, *example.completion])
            log_probs_LV = model(ids[None]).logits[0].log_softmax(-1)
            positions = range(len(example.prompt), len(ids))
            log_probs += [log_probs_LV[position - 1, ids[position]] for position in positions]
        loss = -torch.stack(log_probs).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def flat_weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loss of each step with all its digits, filled while a training runs."""
    recorded: list[float] = []
    add = MetricsLogger.add

    def recording_add(self: MetricsLogger, tokens: int, loss: float, **named: Any) -> None:
        recorded.append(loss)
        add(self, tokens, loss, **named)

    monkeypatch.setattr(MetricsLogger, "add", recording_add)
    return recorded


@pytest.mark.parametrize(("micro_batch_size", "max_grad_norm"), [(None, 0.5), (2, 100.0)])
def test_training_equals_a_plain_loop(
    micro_batch_size: int | None, max_grad_norm: float, losses: list[float], tmp_path: Path
) -> None:
    """A mean over sequences instead of tokens, padding that is attended to, a loss on prompts, or a
    smaller last batch with the weight of a full one show in the numbers alone. A gradient that is
    always clipped would hide its scale, hence the second threshold."""
    config = tiny.train_config(
        batch_size=BATCH_SIZE, micro_batch_size=micro_batch_size, max_grad_norm=max_grad_norm
    )
    model, result = train(config, tmp_path)
    expected_model, expected_losses = train_plainly(config)
    np.testing.assert_allclose(losses, expected_losses, atol=1e-5)
    torch.testing.assert_close(
        flat_weights(model), flat_weights(expected_model), atol=1e-4, rtol=1e-3
    )
    assert expected_losses[-1] < expected_losses[0] - 0.2, "nothing is learnt"
    num_tokens = EPOCHS * sum(len(example.completion) for example in make_examples())
    assert result == TrainResult(NUM_STEPS, num_tokens, None)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("steps", [1, 3, NUM_STEPS])
def test_a_killed_training_resumes_to_the_same_weights(
    steps: int, losses: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed after a step and before that step's checkpoint. If a sequence, a moment of the
    optimizer or an order were lost, the remaining losses would differ."""
    config = tiny.train_config(batch_size=BATCH_SIZE, checkpoint_every=2)
    expected_model, expected_result = train(config, tmp_path / "uninterrupted")
    expected_losses, recording_add = list(losses), MetricsLogger.add
    losses.clear()

    def killing_add(self: MetricsLogger, *args: Any, **named: Any) -> None:
        recording_add(self, *args, **named)
        if len(losses) == steps:
            raise KilledError

    monkeypatch.setattr(MetricsLogger, "add", killing_add)
    with pytest.raises(KilledError):
        train(config, tmp_path / "killed")
    monkeypatch.setattr(MetricsLogger, "add", recording_add)
    resumed_from = (steps - 1) // config.checkpoint_every * config.checkpoint_every
    model, result = train(config, tmp_path / "killed")
    assert torch.equal(flat_weights(model), flat_weights(expected_model))
    assert result == expected_result
    assert losses == [*expected_losses[:steps], *expected_losses[resumed_from:]]
