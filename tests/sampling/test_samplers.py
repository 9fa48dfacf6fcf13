"""Draws: from the model's own distribution, the same whatever else is in the batch."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from boltlm.sampling import cache, samplers
from boltlm.sampling.cache import length_batches
from boltlm.sampling.samplers import Draw, Key, TransformersSampler
from boltlm.sampling.scoring import token_log_probs
from tests import exact
from tests.tiny import ORDINARY, Tiny

MOST = 4  # tokens a latent
PROMPTS = [[2, 1], [2], [2, 4, 4, 7, 1, 3, 6], [2, 7, 3, 8], [2, 1, 1, 4]]
KEYS: list[Key] = [("draws", "doc", i) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def sampler(enumerable: Tiny) -> TransformersSampler:
    return TransformersSampler(enumerable.model, enumerable.markers, MOST, 100_000, seed=1)


@pytest.fixture(scope="module")
def drawn(sampler: TransformersSampler) -> list[list[Draw]]:
    return sampler.sample(PROMPTS, KEYS, 600)


def content(groups: list[list[Draw]]) -> list[list[tuple[tuple[int, ...], str]]]:
    return [[(draw.tokens, draw.finish) for draw in group] for group in groups]


def test_log_q_is_the_score_of_what_was_drawn(enumerable: Tiny, drawn: list[list[Draw]]) -> None:
    """log w subtracts log q from scores: both must be of the same tokens, the ending included."""
    ends = {"stop": enumerable.markers.eol, "eos": enumerable.markers.eos}
    for prompt, group in zip(PROMPTS, drawn, strict=True):
        ended = [draw for draw in group if draw.finish in ends][:100]
        branches = [[*draw.tokens, ends[draw.finish]] for draw in ended]
        assert {draw.finish for draw in ended} == set(ends)
        (scored,) = token_log_probs(enumerable.model, [prompt], [branches], 100_000)
        for draw, logs in zip(ended, scored, strict=True):
            assert draw.log_q == pytest.approx(logs.sum(), abs=1e-4)


def test_every_ending_happens_and_is_labelled(enumerable: Tiny, drawn: list[list[Draw]]) -> None:
    """Only `stop` is a latent. A special token, EoL or EOS inside would break the layouts."""
    m = enumerable.markers
    draws = [draw for group in drawn for draw in group]
    counts = Counter(draw.finish for draw in draws)
    assert set(counts) == {"stop", "length", "eos", "special"}
    for draw in draws:
        assert not set(draw.tokens) & {m.bos, m.eos, m.sol, m.eol, m.prior, m.post}
        assert len(draw.tokens) <= MOST
        assert draw.finish != "length" or len(draw.tokens) == MOST
    lengths = {len(draw.tokens) for draw in draws if draw.finish == "stop"}
    assert lengths == set(range(MOST + 1))


def test_the_share_of_every_ending_is_the_models(
    enumerable: Tiny, sampler: TransformersSampler
) -> None:
    """The limit is on the latent, not on latent and EoL: an off-by-one there moves these."""
    m, slow = enumerable.markers, exact.double(enumerable.model)
    wanted = dict.fromkeys(["stop", "eos", "special", "length"], 0.0)
    for latent in exact.latents(ORDINARY, MOST):
        reached = exact.log_probs(slow, PROMPTS[2], latent).sum() if latent else 0.0
        probs_V = np.exp(reached) * exact.next_probs(slow, [*PROMPTS[2], *latent])
        wanted["stop"] += probs_V[m.eol]
        wanted["eos"] += probs_V[m.eos]
        wanted["special"] += probs_V[[m.bos, m.sol, m.prior, m.post]].sum()
        wanted["length"] += probs_V[list(ORDINARY)].sum() if len(latent) == MOST else 0.0
    assert sum(wanted.values()) == pytest.approx(1)
    (group,) = sampler.sample([PROMPTS[2]], [("shares",)], 6000)
    seen = Counter(draw.finish for draw in group)
    expected = [share * len(group) for share in wanted.values()]
    assert exact.chi2([seen[name] for name in wanted], expected) > 1e-4


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_first_tokens_have_the_models_frequencies(
    enumerable: Tiny, sampler: TransformersSampler, prompt: list[int]
) -> None:
    """Temperature 1, no top-k, no top-p: χ² of 5,000 draws against the softmax, at 10⁻⁴."""
    (group,) = sampler.sample([prompt], [("first", *prompt)], 5000)
    firsts = Counter(draw.tokens[0] if draw.tokens else draw.finish for draw in group)
    m = enumerable.markers
    probs_V = exact.next_probs(exact.double(enumerable.model), prompt)
    names = [*ORDINARY, "stop", "eos", "special"]
    special = probs_V[[m.bos, m.sol, m.prior, m.post]].sum()
    probs = np.array([*probs_V[list(ORDINARY)], probs_V[m.eol], probs_V[m.eos], special])
    assert exact.chi2([firsts[n] for n in names], probs * len(group)) > 1e-4


def test_draws_of_a_prompt_are_independent(enumerable: Tiny, sampler: TransformersSampler) -> None:
    """Random numbers used twice, for two draws or two steps, would show as a correlation: the
    second token given the first, and one draw given the one before."""
    (group,) = sampler.sample([PROMPTS[0]], [("pairs",)], 6000)
    firsts = [draw.tokens[0] if draw.tokens else -1 for draw in group]
    neighbours = Counter(zip(firsts[::2], firsts[1::2], strict=True))
    table = np.array([[neighbours[a, b] for b in ORDINARY] for a in ORDINARY])
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    distance = ((table - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(distance, df=4) > 1e-4
    slow = exact.double(enumerable.model)
    for first in ORDINARY:
        begun = [draw for draw in group if draw.tokens[:1] == (first,)]
        probs_V = exact.next_probs(slow, [*PROMPTS[0], first])
        seen = Counter(draw.tokens[1] for draw in begun if len(draw.tokens) > 1)
        observed = [seen[token] for token in ORDINARY]
        expected = [probs_V[token] * len(begun) for token in ORDINARY]
        rest = len(begun) - np.array([sum(observed), sum(expected)])
        assert exact.chi2([*observed, rest[0]], [*expected, rest[1]]) > 1e-4


def test_draws_do_not_depend_on_the_batch(
    sampler: TransformersSampler, drawn: list[list[Draw]]
) -> None:
    """SPEC 2: alone, together, in another order or in other batches, a chunk draws the same."""
    some = [group[:40] for group in drawn]
    alone = [sampler.sample([p], [k], 40)[0] for p, k in zip(PROMPTS, KEYS, strict=True)]
    assert content(alone) == content(some)
    reverse = sampler.sample(PROMPTS[::-1], KEYS[::-1], 40)[::-1]
    assert content(reverse) == content(some)
    for batch_tokens in (1, 700):
        small = replace(sampler, batch_tokens=batch_tokens).sample(PROMPTS, KEYS, 40)
        assert content(small) == content(some)
        for group, other in zip(small, some, strict=True):
            np.testing.assert_allclose(
                [draw.log_q for draw in group], [draw.log_q for draw in other], atol=1e-5
            )


def test_more_draws_leave_the_first_as_they_are(
    sampler: TransformersSampler, drawn: list[list[Draw]]
) -> None:
    """K = 4 is the first four of K = 8, so studies over K share their draws."""
    for draws in (1, 3):
        few = sampler.sample(PROMPTS, KEYS, draws)
        assert content(few) == content([group[:draws] for group in drawn])


def test_keys_and_seeds_give_other_draws(sampler: TransformersSampler) -> None:
    """The same prompt under another key, or another seed, is drawn afresh."""
    key: Key = ("a",)
    (one,) = sampler.sample([PROMPTS[0]], [key], 30)
    (other,) = sampler.sample([PROMPTS[0]], [("b",)], 30)
    (reseeded,) = replace(sampler, seed=2).sample([PROMPTS[0]], [key], 30)
    assert len({tuple(map(str, group)) for group in (one, other, reseeded)}) == 3
    assert len(set(one)) > 3


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_is_an_argmax_loop(
    enumerable: Tiny, sampler: TransformersSampler, prompt: list[int]
) -> None:
    """Answers are read from greedy text: the most likely token each time, until an ending."""
    slow, m = exact.double(enumerable.model), enumerable.markers
    tokens: list[int] = []
    while True:
        best = int(exact.next_probs(slow, [*prompt, *tokens]).argmax())
        if best not in ORDINARY or len(tokens) == MOST:
            break
        tokens.append(best)
    ((draw,),) = replace(sampler, greedy=True).sample([prompt], [("greedy",)], 1)
    assert draw.tokens == tuple(tokens)
    assert draw.finish == (
        "length" if best in ORDINARY else {m.eol: "stop", m.eos: "eos"}.get(best, "special")
    )


@pytest.mark.parametrize(("room", "live"), [(1, 0.7), (32, 0.0), (32, 1.1)])
def test_how_rows_are_kept_changes_nothing(
    room: int,
    live: float,
    sampler: TransformersSampler,
    drawn: list[list[Draw]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Caches that grow at every step, rows that stay when they ended, rows that never stay."""
    monkeypatch.setattr(cache, "ROOM", room)
    monkeypatch.setattr(samplers, "LIVE", live)
    again = sampler.sample(PROMPTS, KEYS, 600)
    assert content(again) == content(drawn)
    for group, others in zip(again, drawn, strict=True):
        for one, other in zip(group, others, strict=True):
            assert one.log_q == pytest.approx(other.log_q, abs=1e-5)


@given(
    sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), max_size=25),
    batch_tokens=st.integers(1, 400),
)
def test_batches_hold_every_prompt_once_and_fit(
    sizes: list[tuple[int, int]], batch_tokens: int
) -> None:
    """A batch beyond its budget runs out of memory; a prompt in none would have no draws."""
    lengths, copies = [length for length, _ in sizes], [count for _, count in sizes]
    batches = length_batches(lengths, copies, batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        rows = sum(copies[index] for index in batch)
        assert len(batch) == 1 or rows * longest <= batch_tokens
