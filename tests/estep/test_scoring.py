"""The cached, padded and batched log-probabilities equal those of a plain loop in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
from transformers import PreTrainedModel

from boltlm.estep import scoring
from boltlm.estep.scoring import token_log_probs
from tests import reference, tiny

TOLERANCE = 1e-4  # nats per token, the error of float32
VOCAB_SIZE = 40


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A random Llama whose log-probabilities range from near 0 to far below −10."""
    model = tiny.llama(3, vocab_size=VOCAB_SIZE, hidden_size=16)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(20)
    return model


def random_ids(lengths: Sequence[tuple[int, Sequence[int]]]) -> tuple[list, list]:
    """Random prefixes and branches of the given lengths."""
    rng = np.random.default_rng(1)

    def ids(length: int) -> list[int]:
        return rng.integers(0, VOCAB_SIZE, size=length).tolist()

    return [ids(p) for p, _ in lengths], [[ids(b) for b in group] for _, group in lengths]


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
    "lengths",
    [MIXED, ONLY_ONE_TOKEN, ONLY_EMPTY, MIXED[:1], []],
    ids=["mixed", "one token", "empty", "single", "none"],
)
def test_it_equals_a_plain_loop(
    model: PreTrainedModel, lengths: list[tuple[int, tuple[int, ...]]], batch_tokens: int
) -> None:
    """Weights depend on these values: left padding, the shared cache and position ids must have no
    effect, at every batch size, for prefixes of one token and for empty branches."""
    prefixes, branches = random_ids(lengths)
    model64 = reference.double(model)
    log_probs = token_log_probs(model, prefixes, branches, batch_tokens)
    assert len(log_probs) == len(lengths)
    for prefix, group, log_probs_KL in zip(prefixes, branches, log_probs, strict=True):
        for branch, log_probs_L in zip(group, log_probs_KL, strict=True):
            assert log_probs_L.dtype == np.float64
            assert log_probs_L.shape == (len(branch),)
            expected = reference.log_probs(model64, prefix, branch) if branch else np.zeros(0)
            np.testing.assert_allclose(log_probs_L, expected, atol=TOLERANCE, rtol=0)


def test_barred_tokens_have_no_probability(model: PreTrainedModel) -> None:
    """The other tokens are renormalised: their log-probabilities are those of a plain loop whose
    logits of the barred tokens are −∞."""
    prefixes, branches = random_ids(MIXED)
    barred = (0, 7, VOCAB_SIZE - 1)
    branches = [[[t for t in b if t not in barred] for b in group] for group in branches]
    log_probs = token_log_probs(model, prefixes, branches, 1000, barred)
    model64, shifts = reference.double(model), []
    for prefix, group, log_probs_KL in zip(prefixes, branches, log_probs, strict=True):
        for branch, log_probs_L in zip(group, log_probs_KL, strict=True):
            if branch:
                expected = reference.log_probs(model64, prefix, branch, barred)
                np.testing.assert_allclose(log_probs_L, expected, atol=TOLERANCE, rtol=0)
                shifts += list(expected - reference.log_probs(model64, prefix, branch))
    assert max(shifts) > 0.1


def test_the_test_model_is_hard_enough(model: PreTrainedModel) -> None:
    """With a nearly uniform model a wrong position id or mask would go unnoticed."""
    prefixes, branches = random_ids(MIXED)
    log_probs = token_log_probs(model, prefixes, branches, 1000)
    shifted = token_log_probs(model, [[0, *p] for p in prefixes], branches, 1000)
    flat, flat_shifted = (
        np.concatenate([log_probs_L for group in groups for log_probs_L in group])
        for groups in (log_probs, shifted)
    )
    assert flat.std() > 1
    assert np.abs(flat_shifted - flat).max() > 0.1


def test_computing_logits_in_parts_changes_nothing(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are computed for a few positions at a time; the boundaries must have no effect."""
    prefixes, branches = random_ids(MIXED)
    at_once = token_log_probs(model, prefixes, branches, 100_000)
    monkeypatch.setattr(scoring, "LOGIT_POSITIONS", 7)
    in_parts = token_log_probs(model, prefixes, branches, 100_000)
    for group, expected_group in zip(in_parts, at_once, strict=True):
        for log_probs_L, expected_L in zip(group, expected_group, strict=True):
            np.testing.assert_allclose(log_probs_L, expected_L, atol=1e-6)
