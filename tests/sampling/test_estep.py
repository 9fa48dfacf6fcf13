"""The E-step against an enumeration of every latent, with the model of tests/tiny.py.

Its nine tokens leave 40 latents of up to three tokens, so Σ_Z q w, the frequencies of draws and
of kept draws, and the bounds are sums that are done here in float64. What a sampled mean may
differ by is taken from the exact variance.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from boltlm.records import Sample
from boltlm.sampling.estep import EStep, Item
from boltlm.sampling.samplers import Draw, Key
from boltlm.sampling.weights import iwae
from boltlm.sequences.layouts import Ids
from tests import exact, tiny
from tests.exact import Table

MOST = 3  # tokens a latent
CASES = {
    "no context": Item("d", 0, (), (1, 4)),
    "a context": Item("d", 1, (1, 4), (7,)),
    "a long context": Item("e", 2, (7, 7, 1), (4, 1, 7)),
}


def make(
    enumerable: tiny.Tiny, *, seed: int = 1, purpose: str = "tests", batch_tokens: int = 1 << 20
) -> EStep:
    return EStep(
        enumerable.model,
        enumerable.coder,
        tiny.sampling_config(batch_tokens=batch_tokens),
        max_latent_tokens=MOST,
        seed=seed,
        purpose=purpose,
    )


@pytest.fixture(scope="module")
def estep(enumerable: tiny.Tiny) -> EStep:
    return make(enumerable)


@pytest.fixture(scope="module", params=CASES)
def item(request: pytest.FixtureRequest) -> Item:
    return CASES[request.param]


@pytest.fixture(scope="module")
def tables(enumerable: tiny.Tiny) -> dict[Item, Table]:
    slow, m = exact.double(enumerable.model), enumerable.markers
    found = exact.latents(tiny.ORDINARY, MOST)
    return {
        item: Table(found, [exact.parts(slow, m, item.context, item.text, z) for z in found])
        for item in CASES.values()
    }


@pytest.fixture(scope="module")
def many(estep: EStep) -> dict[Item, list[Sample]]:
    """12,000 draws of each case."""
    return {item: estep.run([item], 12_000)[0] for item in CASES.values()}


def weights(samples: list[Sample]) -> np.ndarray:
    return np.exp([sample.log_weight for sample in samples])


def test_the_model_is_hard_enough(tables: dict[Item, Table], item: Item) -> None:
    """Weights that hardly vary, or draws that hardly fail, would let faults pass."""
    table = tables[item]
    assert table.log_w.std() > 0.5
    assert 0.6 < table.q.sum() < 0.9
    assert table.q[np.array([len(z) == MOST for z in table.latents])].sum() > 0.05


def test_the_mean_weight_is_the_marginal_likelihood(
    tables: dict[Item, Table], many: dict[Item, list[Sample]], item: Item
) -> None:
    """E_q[w] = Σ_Z p(Z, EoL | C) p(X | C, Z), the identity that every bound rests on. A wrong
    sign, prompt, shift or ending on either side breaks it."""
    table, w = tables[item], weights(many[item])
    variance = (table.q * np.exp(2 * table.log_w)).sum() - table.joint**2
    error = np.sqrt(variance / len(w))
    assert error < 0.02 * table.joint
    assert abs(w.mean() - table.joint) < 4 * error


def test_draws_have_the_frequencies_of_q(
    tables: dict[Item, Table], many: dict[Item, list[Sample]], item: Item
) -> None:
    """χ² over all 40 latents and the failures, at 10⁻⁴: temperature 1, nothing cut off."""
    table, drawn = tables[item], many[item]
    seen = Counter(s.tokens if s.finish == "stop" else None for s in drawn)
    expected = np.append(table.q, 1 - table.q.sum()) * len(drawn)
    observed = np.array([*(seen[z] for z in table.latents), seen[None]])
    assert observed.sum() == len(drawn)
    assert exact.chi2(observed, expected) > 1e-4


def test_scores_are_those_of_hand_written_prompts(
    enumerable: tiny.Tiny, tables: dict[Item, Table], many: dict[Item, list[Sample]], item: Item
) -> None:
    """SPEC 4: EoL is counted in both, the mode tokens in neither. Every latent that was drawn,
    within 10⁻⁴ nats of the sums over prompts written out by hand."""
    by_latent = dict(zip(tables[item].latents, tables[item].parts, strict=True))
    drawn = {s.tokens: s for s in many[item] if s.finish == "stop"}
    assert len(drawn) > 30
    for tokens, sample in drawn.items():
        wanted = by_latent[tokens]
        assert sample.log_q == pytest.approx(wanted.log_q, abs=1e-4)
        assert sample.log_p_latent == pytest.approx(wanted.log_p_latent, abs=1e-4)
        assert sample.log_p_text == pytest.approx(wanted.log_p_text, abs=1e-4)
        assert sample.log_weight == pytest.approx(wanted.log_w, abs=3e-4)
    slow, m = exact.double(enumerable.model), enumerable.markers
    modes = exact.log_probs(slow, [m.bos, *item.context], [m.sol, m.prior])
    assert np.abs(modes).min() > 0.01, "counting a mode token would not show"


def test_failed_draws_have_no_weight(many: dict[Item, list[Sample]], item: Item) -> None:
    """They are stored with their q and how they ended; p is not asked, and none is kept."""
    failed = [sample for sample in many[item] if sample.finish != "stop"]
    assert {sample.finish for sample in failed} == {"length", "eos", "special"}
    for sample in failed:
        assert sample.log_weight == -np.inf
        assert np.isnan(sample.log_p_latent)
        assert np.isnan(sample.log_p_text)
        assert sample.log_q < 0
        assert not sample.selected


def copies(item: Item, count: int) -> list[Item]:
    """The same chunk under many names, each with random numbers of its own."""
    return [replace(item, doc_id=f"copy {n}") for n in range(count)]


def test_kept_draws_have_the_frequencies_of_the_weights(
    estep: EStep, tables: dict[Item, Table], item: Item
) -> None:
    """With K = 2, P(keep Z) is a sum over pairs; χ² over 4,000 chunks, at 10⁻⁴. Keeping the
    first, the best or an even one fails."""
    table, count = tables[item], 4000
    q_Z = np.append(table.q, 1 - table.q.sum())
    w_Z = np.append(np.exp(table.log_w), 0.0)
    total_ZZ = w_Z[:, None] + w_Z[None, :]
    share_ZZ = np.divide(w_Z[:, None], total_ZZ, out=np.zeros_like(total_ZZ), where=total_ZZ > 0)
    kept_Z = 2 * q_Z * (share_ZZ * q_Z[None, :]).sum(1)
    groups = estep.run(copies(item, count), 2)
    seen = Counter(s.tokens for group in groups for s in group if s.selected)
    observed = np.array([*(seen[z] for z in table.latents), count - sum(seen.values())])
    expected = np.append(kept_Z[:-1], 1 - kept_Z.sum()) * count
    assert exact.chi2(observed, expected) > 1e-4
    best = 2 * q_Z * ((w_Z[:, None] > w_Z) * q_Z).sum(1) + q_Z**2
    assert abs(best[:-1] - kept_Z[:-1]).max() > 0.01, "keeping the best would not show"


def test_at_most_one_draw_is_kept(estep: EStep, item: Item) -> None:
    """One where any is a latent, none where all failed, and both happen."""
    groups = estep.run(copies(item, 500), 3)
    finished = [any(s.finish == "stop" for s in group) for group in groups]
    assert [sum(s.selected for s in group) for group in groups] == list(map(int, finished))
    assert len(set(finished)) == 2
    assert all(s.finish == "stop" for group in groups for s in group if s.selected)


def test_with_one_draw_the_kept_is_the_drawn(estep: EStep, item: Item) -> None:
    """SPEC 4: K = 1 is training on the model's own latents, failures aside."""
    for (sample,) in estep.run(copies(item, 300), 1):
        assert sample.selected == (sample.finish == "stop")


def test_a_chunk_whose_draws_all_failed(estep: EStep, item: Item) -> None:
    """Alone in its batch there is nothing to score: nothing is kept, and nothing breaks."""
    groups = estep.run(copies(item, 500), 3)
    (failed, *_) = (g for g in groups if all(s.finish != "stop" for s in g))
    (alone,) = estep.run([replace(item, doc_id=failed[0].doc_id)], 3)
    assert [s.finish for s in alone] == [s.finish for s in failed]
    assert all(s.log_weight == -np.inf and not s.selected for s in alone)


def test_the_bound_rises_with_k(
    tables: dict[Item, Table], many: dict[Item, list[Sample]], item: Item
) -> None:
    """E[IWAE_1] < E[IWAE_2] < log E[w], summed over all draws and pairs of draws that finish;
    the means over sampled ones are where these sums say, within 4 standard errors."""
    table = tables[item]
    q_Z = table.q / table.q.sum()
    log_w_ZZ = np.logaddexp(table.log_w[:, None], table.log_w[None, :]) - np.log(2)
    values = {1: (q_Z, table.log_w), 2: (np.outer(q_Z, q_Z).ravel(), log_w_ZZ.ravel())}
    done = np.array([s.log_weight for s in many[item] if s.finish == "stop"])
    expected = []
    for k, (probability, bound) in values.items():
        mean = (probability * bound).sum()
        variance = (probability * bound**2).sum() - mean**2
        sampled = iwae(done[: len(done) // k * k].reshape(-1, k))
        assert abs(sampled.mean() - mean) < 4 * np.sqrt(variance / len(sampled))
        expected.append(mean)
    one, two = expected
    assert one + 0.05 < two < np.log(table.joint / table.q.sum())


def test_bounds_count_every_draw(many: dict[Item, list[Sample]], item: Item) -> None:
    """Failures included, e^IWAE_K has one and the same mean for every K, the mean weight; sets
    in which every draw fails get rarer."""
    log_w = np.array([s.log_weight for s in many[item]])
    by_k = {k: iwae(log_w.reshape(-1, k)) for k in (1, 2, 4, 8)}
    for bounds in by_k.values():
        assert np.exp(bounds).mean() == pytest.approx(np.exp(log_w).mean())
    failed = [np.isneginf(bounds).mean() for bounds in by_k.values()]
    assert failed == sorted(failed, reverse=True)
    assert failed[0] > failed[1] > 0


def content(groups: list[list[Sample]]) -> list[list[tuple]]:
    return [
        [(s.doc_id, s.chunk, s.sample, s.tokens, s.finish, s.selected) for s in g] for g in groups
    ]


def test_results_do_not_depend_on_the_batch(enumerable: tiny.Tiny, estep: EStep) -> None:
    """SPEC 4: a shard's result is the same whichever worker, batch or order made it."""
    found = [replace(item, chunk=n) for item, n in itertools.product(CASES.values(), range(12))]
    together = estep.run(found, 4)
    assert content([estep.run([item], 4)[0] for item in found]) == content(together)
    assert content(estep.run(found[::-1], 4)[::-1]) == content(together)
    again = make(enumerable, batch_tokens=200).run(found, 4)
    assert content(again) == content(together)
    np.testing.assert_allclose(
        [s.log_weight for group in again for s in group],
        [s.log_weight for group in together for s in group],
        atol=1e-4,
    )


def test_results_depend_on_seed_purpose_document_and_chunk(
    enumerable: tiny.Tiny, estep: EStep
) -> None:
    """Two E-steps of one run must not draw the same numbers, nor two chunks."""
    item = CASES["a context"]
    found = [replace(item, chunk=n) for n in range(20)]
    first = [tuple(s.tokens for s in group) for group in estep.run(found, 4)]
    assert [tuple(s.tokens for s in g) for g in make(enumerable).run(found, 4)] == first
    assert len(set(first)) > 10
    for other in (make(enumerable, seed=2), make(enumerable, purpose="evaluate")):
        assert [tuple(s.tokens for s in group) for group in other.run(found, 4)] != first
    renamed = [replace(one, doc_id="other") for one in found]
    assert [tuple(s.tokens for s in group) for group in estep.run(renamed, 4)] != first


class Same:
    """A sampler of equal draws, so that only the selection's own number decides."""

    def sample(
        self, prompts: Sequence[Ids], keys: Sequence[Key], draws: int, first: int = 0
    ) -> list[list[Draw]]:
        assert first == 0
        assert len(keys) == len(prompts)
        return [[Draw((1,), "stop", -1.0)] * draws for _ in prompts]


def test_selection_has_a_number_for_each_seed_purpose_document_and_chunk(
    enumerable: tiny.Tiny,
) -> None:
    """Evaluation must not repeat the choices of training, nor one chunk those of another."""
    found = [replace(CASES["a context"], chunk=n) for n in range(40)]
    renamed = [replace(item, doc_id="other") for item in found]

    def kept(made: EStep, asked: list[Item]) -> tuple[int, ...]:
        made.sampler = Same()
        return tuple([s.selected for s in group].index(True) for group in made.run(asked, 4))

    first = kept(make(enumerable), found)
    others = [kept(make(enumerable, seed=2), found), kept(make(enumerable), renamed)]
    others.append(kept(make(enumerable, purpose="evaluate"), found))
    assert kept(make(enumerable), found) == first
    assert set(first) == {0, 1, 2, 3}
    assert len({first, *others}) == 4


def test_more_draws_leave_the_first_as_they_are(estep: EStep) -> None:
    """Bounds for a smaller K come from the same table."""
    found = list(CASES.values())
    eight = [[s.tokens for s in group[:4]] for group in estep.run(found, 8)]
    assert [[s.tokens for s in group] for group in estep.run(found, 4)] == eight


def test_samples_name_their_chunk(enumerable: tiny.Tiny, estep: EStep) -> None:
    """Later stages join by these names; the text is what the ids say."""
    groups = estep.run(list(CASES.values()), 5)
    for item, group in zip(CASES.values(), groups, strict=True):
        assert [(s.doc_id, s.chunk, s.sample) for s in group] == [
            (item.doc_id, item.chunk, k) for k in range(5)
        ]
        assert all(s.latent == enumerable.coder.decode(list(s.tokens)) for s in group)
