"""Draws come from the model's distribution over the tokens that a latent can contain, and do not
depend on the rest of the batch.

Shapes: L positions, V vocabulary.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from boltlm.estep import kv_cache, samplers
from boltlm.estep.kv_cache import batch_by_length
from boltlm.estep.samplers import Draw, SampleKey, TransformersSampler, inverse_cdf
from boltlm.estep.scoring import token_log_probs
from tests import reference
from tests.tiny import ORDINARY, Tiny

MAX_LATENT_TOKENS = 4
PROMPTS = [[2, 1], [2], [2, 4, 4, 7, 1, 3, 6], [2, 7, 3, 8], [2, 1, 1, 4]]
KEYS: list[SampleKey] = [("draws", "doc", i) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def sampler(enumerable: Tiny) -> TransformersSampler:
    return TransformersSampler(
        enumerable.model, enumerable.special_tokens, MAX_LATENT_TOKENS, 100_000, seed=1
    )


@pytest.fixture(scope="module")
def draws(sampler: TransformersSampler) -> list[list[Draw]]:
    return sampler.sample(PROMPTS, KEYS, 600)


def content(groups: list[list[Draw]]) -> list[list[tuple[tuple[int, ...], str]]]:
    return [[(draw.tokens, draw.finish) for draw in group] for group in groups]


def test_log_q_is_the_score_of_what_was_drawn(enumerable: Tiny, draws: list[list[Draw]]) -> None:
    """log w subtracts log q′ from scores: both must cover the same tokens, EoL included. With
    `log_allowed` it is the model's own log-probability, within 10⁻⁴ nats."""
    m = enumerable.special_tokens
    for prompt, group in zip(PROMPTS, draws, strict=True):
        some = group[:100]
        branches = [[*draw.tokens, m.eol] for draw in some]
        (plain,) = token_log_probs(enumerable.model, [prompt], [branches], 100_000)
        (masked,) = token_log_probs(enumerable.model, [prompt], [branches], 100_000, m.barred)
        for draw, plain_L, masked_L in zip(some, plain, masked, strict=True):
            drawn_tokens = len(draw.tokens) + (draw.finish == "stop")
            assert draw.log_q == pytest.approx(masked_L[:drawn_tokens].sum(), abs=1e-4)
            assert draw.log_q + draw.log_allowed == pytest.approx(plain_L.sum(), abs=1e-4)
            assert draw.log_allowed <= 0


def test_every_draw_is_a_latent(draws: list[list[Draw]]) -> None:
    """A special token inside a latent would violate the token grammar. Latents of all lengths occur
    up to the limit, and EoL is forced at the limit only."""
    flat = [draw for group in draws for draw in group]
    for draw in flat:
        assert set(draw.tokens) <= set(ORDINARY)
        assert len(draw.tokens) <= MAX_LATENT_TOKENS
        assert draw.finish == ("length" if len(draw.tokens) == MAX_LATENT_TOKENS else "stop")
    assert {len(draw.tokens) for draw in flat} == set(range(MAX_LATENT_TOKENS + 1))


def test_lengths_have_the_probabilities_of_the_proposal(
    enumerable: Tiny, sampler: TransformersSampler
) -> None:
    """The length limit applies to the latent without EoL: an off-by-one error there changes these
    probabilities."""
    m, model64 = enumerable.special_tokens, reference.double(enumerable.model)
    probability = np.zeros(MAX_LATENT_TOKENS + 1)
    for latent in reference.latents(ORDINARY, MAX_LATENT_TOKENS):
        log_q = reference.log_probs(
            model64, PROMPTS[2], [*latent, m.eol], reference.barred_tokens(m)
        )
        probability[len(latent)] += np.exp(log_q[:MAX_LATENT_TOKENS].sum())
    assert probability.sum() == pytest.approx(1)
    (group,) = sampler.sample([PROMPTS[2]], [("shares",)], 6000)
    counts = Counter(len(draw.tokens) for draw in group)
    observed = [counts[length] for length in range(MAX_LATENT_TOKENS + 1)]
    assert reference.chi2(observed, probability * len(group)) > 1e-4


@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 2**-53])
def test_a_token_of_probability_0_is_never_chosen(noise: float) -> None:
    """Neither at the ends of the range of the uniform numbers nor in between; the log of the total
    is exact however little of the distribution is left."""
    log_probs_1V = torch.tensor([[-torch.inf, -80.0, -torch.inf, -81.0, -torch.inf]])
    noise_11 = torch.tensor([[noise]], dtype=torch.float64)
    tokens_11, log_total_11 = inverse_cdf(log_probs_1V, noise_11)
    assert tokens_11.item() == (3 if noise > 0.9 else 1)
    assert log_total_11.item() == pytest.approx(np.logaddexp(-80, -81), abs=1e-12)


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_first_tokens_have_the_models_probabilities(
    enumerable: Tiny, sampler: TransformersSampler, prompt: list[int]
) -> None:
    """Temperature 1, no top-k, no top-p: χ² test of 5,000 draws against the softmax over ordinary
    tokens and EoL, level 10⁻⁴."""
    (group,) = sampler.sample([prompt], [("first", *prompt)], 5000)
    m = enumerable.special_tokens
    outcomes = [*ORDINARY, m.eol]
    probs = reference.next_probs(reference.double(enumerable.model), prompt)[outcomes]
    counts = Counter(draw.tokens[0] if draw.tokens else m.eol for draw in group)
    observed = [counts[outcome] for outcome in outcomes]
    assert reference.chi2(observed, probs / probs.sum() * len(group)) > 1e-4


def test_draws_of_a_prompt_are_independent(enumerable: Tiny, sampler: TransformersSampler) -> None:
    """A random number that is used for two draws, or for two steps, would show as a correlation: of
    the second token with the first, or of a draw with the previous one."""
    (group,) = sampler.sample([PROMPTS[0]], [("pairs",)], 6000)
    first_tokens = [draw.tokens[0] if draw.tokens else -1 for draw in group]
    pairs = Counter(zip(first_tokens[::2], first_tokens[1::2], strict=True))
    table = np.array([[pairs[a, b] for b in ORDINARY] for a in ORDINARY])
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(statistic, df=4) > 1e-4
    model64 = reference.double(enumerable.model)
    for first in ORDINARY:
        matching = [draw for draw in group if draw.tokens[:1] == (first,)]
        probs_V = reference.next_probs(model64, [*PROMPTS[0], first])
        probs_V /= probs_V[[*ORDINARY, enumerable.special_tokens.eol]].sum()
        counts = Counter(draw.tokens[1] for draw in matching if len(draw.tokens) > 1)
        observed = [counts[token] for token in ORDINARY]
        expected = [probs_V[token] * len(matching) for token in ORDINARY]
        others = len(matching) - np.array([sum(observed), sum(expected)])
        assert reference.chi2([*observed, others[0]], [*expected, others[1]]) > 1e-4


def test_draws_do_not_depend_on_the_batch(
    sampler: TransformersSampler, draws: list[list[Draw]]
) -> None:
    """docs/method.md, 2.5: alone, together, in another order or in other batches, a chunk has the
    same draws."""
    together = [group[:40] for group in draws]
    alone = [sampler.sample([p], [k], 40)[0] for p, k in zip(PROMPTS, KEYS, strict=True)]
    assert content(alone) == content(together)
    reordered = sampler.sample(PROMPTS[::-1], KEYS[::-1], 40)[::-1]
    assert content(reordered) == content(together)
    for batch_tokens in (1, 700):
        small = replace(sampler, batch_tokens=batch_tokens).sample(PROMPTS, KEYS, 40)
        assert content(small) == content(together)
        for group, other in zip(small, together, strict=True):
            np.testing.assert_allclose(
                [draw.log_q for draw in group], [draw.log_q for draw in other], atol=1e-5
            )


def test_a_larger_k_extends_a_smaller_one(
    sampler: TransformersSampler, draws: list[list[Draw]]
) -> None:
    """K = 4 gives the first four draws of K = 8, so studies over K share their draws."""
    for num_samples in (1, 3):
        fewer = sampler.sample(PROMPTS, KEYS, num_samples)
        assert content(fewer) == content([group[:num_samples] for group in draws])


def test_keys_and_seeds_give_other_draws(sampler: TransformersSampler) -> None:
    """The same prompt under another key, or with another seed, has other draws."""
    key: SampleKey = ("a",)
    (first,) = sampler.sample([PROMPTS[0]], [key], 30)
    (rekeyed,) = sampler.sample([PROMPTS[0]], [("b",)], 30)
    (reseeded,) = replace(sampler, seed=2).sample([PROMPTS[0]], [key], 30)
    assert len({tuple(map(str, group)) for group in (first, rekeyed, reseeded)}) == 3
    assert len(set(first)) > 3


@pytest.mark.parametrize(("spare_tokens", "min_active_fraction"), [(1, 0.7), (32, 0.0), (32, 1.1)])
def test_cache_allocation_changes_nothing(
    spare_tokens: int,
    min_active_fraction: float,
    sampler: TransformersSampler,
    draws: list[list[Draw]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Caches that are reallocated at every step; finished rows that are never removed from the
    batch, or always at once."""
    monkeypatch.setattr(kv_cache, "SPARE_TOKENS", spare_tokens)
    monkeypatch.setattr(samplers, "MIN_ACTIVE_FRACTION", min_active_fraction)
    again = sampler.sample(PROMPTS, KEYS, 600)
    assert content(again) == content(draws)
    for group, expected_group in zip(again, draws, strict=True):
        for draw, expected in zip(group, expected_group, strict=True):
            assert draw.log_q == pytest.approx(expected.log_q, abs=1e-5)


@given(
    sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=25),
    batch_tokens=st.integers(1, 400),
)
def test_batches_hold_every_prompt_once_and_fit(
    sizes: list[tuple[int, int]], batch_tokens: int
) -> None:
    """A batch that exceeds its budget may not fit into memory; a prompt in no batch has no draw."""
    lengths, copies = [length for length, _ in sizes], [count for _, count in sizes]
    batches = batch_by_length(lengths, copies, batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
    for batch in batches:
        max_length = max(lengths[index] for index in batch)
        rows = sum(copies[index] for index in batch)
        assert len(batch) == 1 or rows * max_length <= batch_tokens
