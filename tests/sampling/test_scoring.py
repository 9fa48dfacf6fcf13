"""Scoring: the cached, padded, batched log-probabilities are those of a plain float64 loop."""

from collections.abc import Sequence

import numpy as np
import pytest
from transformers import PreTrainedModel

from boltlm.sampling import scoring
from boltlm.sampling.scoring import token_log_probs
from tests import exact, tiny

TOLERANCE = 1e-4  # nats a token: what float32 leaves of float64
VOCABULARY = 40


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A random Llama whose log-probabilities reach from near 0 to far below −10."""
    model = tiny.llama(3, vocabulary=VOCABULARY, width=16)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(20)
    return model


def made(shape: Sequence[tuple[int, Sequence[int]]]) -> tuple[list, list]:
    """Random prefixes and branches of given lengths."""
    draw = np.random.default_rng(1)

    def ids(length: int) -> list[int]:
        return draw.integers(0, VOCABULARY, size=length).tolist()

    return [ids(p) for p, _ in shape], [[ids(b) for b in group] for _, group in shape]


MIXED = [
    (1, (5, 0, 2)),
    (9, (0, 0, 0)),
    (3, (1, 12, 7)),
    (1, (0, 0, 0)),
    (17, (4, 4, 4)),
    (2, (0, 9, 1)),
    (9, (3, 0, 30)),
]
ONLY_ONE_TOKEN = [(1, (5,)), (1, (9,)), (1, (1,))]
ONLY_EMPTY = [(4, (0, 0)), (1, (0, 0)), (6, (0, 0))]


@pytest.mark.parametrize("batch_tokens", [1, 60, 100_000])
@pytest.mark.parametrize(
    "shape",
    [MIXED, ONLY_ONE_TOKEN, ONLY_EMPTY, MIXED[:1], []],
    ids=["mixed", "one token", "empty", "single", "none"],
)
def test_it_equals_a_plain_loop(
    model: PreTrainedModel, shape: list[tuple[int, tuple[int, ...]]], batch_tokens: int
) -> None:
    """Weights rest on these numbers: left padding, the shared cache and positions must leave no
    trace, at every batch size, for prefixes of one token and branches of none."""
    prefixes, branches = made(shape)
    slow = exact.double(model)
    found = token_log_probs(model, prefixes, branches, batch_tokens)
    assert len(found) == len(shape)
    for prefix, group, logs_K in zip(prefixes, branches, found, strict=True):
        for branch, logs in zip(group, logs_K, strict=True):
            assert logs.dtype == np.float64
            assert logs.shape == (len(branch),)
            wanted = exact.log_probs(slow, prefix, branch) if branch else np.zeros(0)
            np.testing.assert_allclose(logs, wanted, atol=TOLERANCE, rtol=0)


def test_the_test_model_is_hard_enough(model: PreTrainedModel) -> None:
    """On a nearly uniform model a wrong position or mask would pass unseen."""
    prefixes, branches = made(MIXED)
    logs = np.concatenate(
        [log for group in token_log_probs(model, prefixes, branches, 1000) for log in group]
    )
    assert logs.std() > 1
    shifted = token_log_probs(model, [[0, *p] for p in prefixes], branches, 1000)
    moved = np.concatenate([log for group in shifted for log in group])
    assert np.abs(moved - logs).max() > 0.1


def test_logits_in_pieces_change_nothing(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits exist for a few positions at a time; a border between pieces must not show."""
    prefixes, branches = made(MIXED)
    whole = token_log_probs(model, prefixes, branches, 100_000)
    monkeypatch.setattr(scoring, "LOGIT_POSITIONS", 7)
    pieces = token_log_probs(model, prefixes, branches, 100_000)
    for group, others in zip(whole, pieces, strict=True):
        for one, other in zip(group, others, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
