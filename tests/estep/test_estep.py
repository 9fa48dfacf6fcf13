"""The E-step compared with an enumeration of every latent, for the model of tests/tiny.py.

With nine tokens there are 40 latents of up to three tokens. So Σ_Z q w, the frequencies of draws
and of selected draws, and the bounds are sums that are computed here in float64. Tolerances of
sampled means come from the exact variance.

Shapes: Z latents of the enumeration, the last entry standing for invalid draws where noted; K
samples of a chunk.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from boltlm.estep.estep import ChunkInContext, EStep
from boltlm.estep.importance import iwae_bound
from boltlm.estep.samplers import Draw, SampleKey
from boltlm.records import Sample
from boltlm.sequences.layouts import TokenIds
from tests import reference, tiny
from tests.reference import Table

MAX_LATENT_TOKENS = 3
CASES = {
    "no context": ChunkInContext("d", 0, (), (1, 4)),
    "a context": ChunkInContext("d", 1, (1, 4), (7,)),
    "a long context": ChunkInContext("e", 2, (7, 7, 1), (4, 1, 7)),
}


def build(
    enumerable: tiny.Tiny, *, seed: int = 1, purpose: str = "tests", batch_tokens: int = 1 << 20
) -> EStep:
    return EStep(
        enumerable.model,
        enumerable.coder,
        tiny.sampling_config(batch_tokens=batch_tokens),
        max_latent_tokens=MAX_LATENT_TOKENS,
        seed=seed,
        purpose=purpose,
    )


@pytest.fixture(scope="module")
def estep(enumerable: tiny.Tiny) -> EStep:
    return build(enumerable)


@pytest.fixture(scope="module", params=CASES)
def chunk(request: pytest.FixtureRequest) -> ChunkInContext:
    return CASES[request.param]


@pytest.fixture(scope="module")
def tables(enumerable: tiny.Tiny) -> dict[ChunkInContext, Table]:
    model64, special = reference.double(enumerable.model), enumerable.special_tokens
    latents = reference.latents(tiny.ORDINARY, MAX_LATENT_TOKENS)
    return {
        chunk: Table(
            latents,
            [reference.parts(model64, special, chunk.context, chunk.text, z) for z in latents],
        )
        for chunk in CASES.values()
    }


@pytest.fixture(scope="module")
def samples(estep: EStep) -> dict[ChunkInContext, list[Sample]]:
    """12,000 samples of each case."""
    return {chunk: estep.run([chunk], 12_000)[0] for chunk in CASES.values()}


def weights(samples: list[Sample]) -> np.ndarray:
    return np.exp([sample.log_weight for sample in samples])


def test_the_model_is_hard_enough(
    tables: dict[ChunkInContext, Table], chunk: ChunkInContext
) -> None:
    """If weights hardly varied, or draws were hardly ever invalid, faults could go unnoticed."""
    table = tables[chunk]
    assert table.log_w.std() > 0.5
    assert 0.6 < table.q.sum() < 0.9
    has_max_length = np.array([len(z) == MAX_LATENT_TOKENS for z in table.latents])
    assert table.q[has_max_length].sum() > 0.05


def test_the_mean_weight_is_the_marginal_likelihood(
    tables: dict[ChunkInContext, Table],
    samples: dict[ChunkInContext, list[Sample]],
    chunk: ChunkInContext,
) -> None:
    """E_q[w] = Σ_Z p(Z, EoL | C) p(X | C, Z), the identity that every bound relies on. A wrong
    sign, prompt, shift or ending in either factor violates it."""
    table, w = tables[chunk], weights(samples[chunk])
    variance = (table.q * np.exp(2 * table.log_w)).sum() - table.joint**2
    standard_error = np.sqrt(variance / len(w))
    assert standard_error < 0.02 * table.joint
    assert abs(w.mean() - table.joint) < 4 * standard_error


def test_draws_have_the_frequencies_of_q(
    tables: dict[ChunkInContext, Table],
    samples: dict[ChunkInContext, list[Sample]],
    chunk: ChunkInContext,
) -> None:
    """χ² test over all 40 latents and the invalid draws, at level 10⁻⁴: the temperature is 1, and
    no part of the distribution is cut off."""
    table, drawn = tables[chunk], samples[chunk]
    counts = Counter(s.tokens if s.finish == "stop" else None for s in drawn)
    expected = np.append(table.q, 1 - table.q.sum()) * len(drawn)
    observed = np.array([*(counts[z] for z in table.latents), counts[None]])
    assert observed.sum() == len(drawn)
    assert reference.chi2(observed, expected) > 1e-4


def test_scores_are_those_of_hand_written_prompts(
    enumerable: tiny.Tiny,
    tables: dict[ChunkInContext, Table],
    samples: dict[ChunkInContext, list[Sample]],
    chunk: ChunkInContext,
) -> None:
    """docs/method.md, 4.1: EoL is counted in log q and in log p, the mode tokens in neither. Every
    latent that was drawn, within 10⁻⁴ nats of the sums over prompts that were written by hand."""
    by_latent = dict(zip(tables[chunk].latents, tables[chunk].parts, strict=True))
    drawn = {s.tokens: s for s in samples[chunk] if s.finish == "stop"}
    assert len(drawn) > 30
    for tokens, sample in drawn.items():
        expected = by_latent[tokens]
        assert sample.log_q == pytest.approx(expected.log_q, abs=1e-4)
        assert sample.log_p_latent == pytest.approx(expected.log_p_latent, abs=1e-4)
        assert sample.log_p_text == pytest.approx(expected.log_p_text, abs=1e-4)
        assert sample.log_weight == pytest.approx(expected.log_w, abs=3e-4)
    model64, m = reference.double(enumerable.model), enumerable.special_tokens
    mode_log_probs = reference.log_probs(model64, [m.bos, *chunk.context], [m.sol, m.prior])
    assert np.abs(mode_log_probs).min() > 0.01, "counting a mode token would go unnoticed"


def test_invalid_draws_have_no_weight(
    samples: dict[ChunkInContext, list[Sample]], chunk: ChunkInContext
) -> None:
    """They are stored with log q and the reason why they ended; they have no log p, and are never
    selected."""
    invalid = [sample for sample in samples[chunk] if sample.finish != "stop"]
    assert {sample.finish for sample in invalid} == {"length", "eos", "special"}
    for sample in invalid:
        assert sample.log_weight == -np.inf
        assert np.isnan(sample.log_p_latent)
        assert np.isnan(sample.log_p_text)
        assert sample.log_q < 0
        assert not sample.selected


def copies(chunk: ChunkInContext, count: int) -> list[ChunkInContext]:
    """The same chunk under different document ids, each with its own random numbers."""
    return [replace(chunk, doc_id=f"copy {n}") for n in range(count)]


def test_selected_draws_have_the_frequencies_of_the_weights(
    estep: EStep, tables: dict[ChunkInContext, Table], chunk: ChunkInContext
) -> None:
    """With K = 2, P(select Z) is a sum over pairs; χ² test over 4,000 chunks, at level 10⁻⁴.
    Selecting the first draw, the best one, or one uniformly fails."""
    table, count = tables[chunk], 4000
    q_Z = np.append(table.q, 1 - table.q.sum())  # the last entry: invalid draws
    w_Z = np.append(np.exp(table.log_w), 0.0)
    sum_ZZ = w_Z[:, None] + w_Z[None, :]
    first_ZZ = np.divide(w_Z[:, None], sum_ZZ, out=np.zeros_like(sum_ZZ), where=sum_ZZ > 0)
    selected_Z = 2 * q_Z * (first_ZZ * q_Z[None, :]).sum(1)
    groups = estep.run(copies(chunk, count), 2)
    counts = Counter(s.tokens for group in groups for s in group if s.selected)
    observed = np.array([*(counts[z] for z in table.latents), count - sum(counts.values())])
    expected = np.append(selected_Z[:-1], 1 - selected_Z.sum()) * count
    assert reference.chi2(observed, expected) > 1e-4
    best_Z = 2 * q_Z * ((w_Z[:, None] > w_Z) * q_Z).sum(1) + q_Z**2
    difference_Z = abs(best_Z[:-1] - selected_Z[:-1])
    assert difference_Z.max() > 0.01, "selecting the best draw would go unnoticed"


def test_at_most_one_draw_is_selected(estep: EStep, chunk: ChunkInContext) -> None:
    """One if any draw is valid, none if all are invalid; both cases occur."""
    groups = estep.run(copies(chunk, 500), 3)
    any_valid = [any(s.finish == "stop" for s in group) for group in groups]
    assert [sum(s.selected for s in group) for group in groups] == list(map(int, any_valid))
    assert len(set(any_valid)) == 2
    assert all(s.finish == "stop" for group in groups for s in group if s.selected)


def test_with_k_1_the_draw_is_selected(estep: EStep, chunk: ChunkInContext) -> None:
    """docs/method.md, 4.1: K = 1 trains on the model's own latents, apart from invalid draws."""
    for (sample,) in estep.run(copies(chunk, 300), 1):
        assert sample.selected == (sample.finish == "stop")


def test_a_chunk_whose_draws_are_all_invalid(estep: EStep, chunk: ChunkInContext) -> None:
    """Alone in its batch it leaves nothing to score: nothing is selected, and nothing fails."""
    groups = estep.run(copies(chunk, 500), 3)
    (invalid, *_) = (g for g in groups if all(s.finish != "stop" for s in g))
    (alone,) = estep.run([replace(chunk, doc_id=invalid[0].doc_id)], 3)
    assert [s.finish for s in alone] == [s.finish for s in invalid]
    assert all(s.log_weight == -np.inf and not s.selected for s in alone)


def test_the_bound_rises_with_k(
    tables: dict[ChunkInContext, Table],
    samples: dict[ChunkInContext, list[Sample]],
    chunk: ChunkInContext,
) -> None:
    """E[IWAE_1] < E[IWAE_2] < log E[w], summed over all valid draws and pairs of them; the means
    over samples agree with these sums within 4 standard errors."""
    table = tables[chunk]
    q_Z = table.q / table.q.sum()
    log_w_ZZ = np.logaddexp(table.log_w[:, None], table.log_w[None, :]) - np.log(2)
    enumerated = {1: (q_Z, table.log_w), 2: (np.outer(q_Z, q_Z).ravel(), log_w_ZZ.ravel())}
    log_w = np.array([s.log_weight for s in samples[chunk] if s.finish == "stop"])
    means = []
    for k, (probability, bound) in enumerated.items():
        mean = (probability * bound).sum()
        variance = (probability * bound**2).sum() - mean**2
        sampled = iwae_bound(log_w[: len(log_w) // k * k].reshape(-1, k))
        assert abs(sampled.mean() - mean) < 4 * np.sqrt(variance / len(sampled))
        means.append(mean)
    assert means[0] + 0.05 < means[1] < np.log(table.joint / table.q.sum())


def test_bounds_count_every_draw(
    samples: dict[ChunkInContext, list[Sample]], chunk: ChunkInContext
) -> None:
    """With invalid draws included, e^IWAE_K has the same mean for every K, the mean weight; sets of
    draws that are all invalid become rarer."""
    log_w = np.array([s.log_weight for s in samples[chunk]])
    by_k = {k: iwae_bound(log_w.reshape(-1, k)) for k in (1, 2, 4, 8)}
    for bounds in by_k.values():
        assert np.exp(bounds).mean() == pytest.approx(np.exp(log_w).mean())
    all_invalid = [np.isneginf(bounds).mean() for bounds in by_k.values()]
    assert all_invalid == sorted(all_invalid, reverse=True)
    assert all_invalid[0] > all_invalid[1] > 0


def content(groups: list[list[Sample]]) -> list[list[tuple]]:
    return [
        [(s.doc_id, s.chunk, s.sample, s.tokens, s.finish, s.selected) for s in g] for g in groups
    ]


def test_results_do_not_depend_on_the_batch(enumerable: tiny.Tiny, estep: EStep) -> None:
    """docs/method.md, 4.4: a chunk's samples are the same whichever batch they are drawn in, and in
    whichever order."""
    chunks = [replace(chunk, chunk=n) for chunk, n in itertools.product(CASES.values(), range(12))]
    together = estep.run(chunks, 4)
    assert content([estep.run([chunk], 4)[0] for chunk in chunks]) == content(together)
    assert content(estep.run(chunks[::-1], 4)[::-1]) == content(together)
    small_batches = build(enumerable, batch_tokens=200).run(chunks, 4)
    assert content(small_batches) == content(together)
    np.testing.assert_allclose(
        [s.log_weight for group in small_batches for s in group],
        [s.log_weight for group in together for s in group],
        atol=1e-4,
    )


def test_results_depend_on_seed_purpose_document_and_chunk(
    enumerable: tiny.Tiny, estep: EStep
) -> None:
    """Two E-steps of a run must not use the same random numbers, nor two chunks."""
    chunk = CASES["a context"]
    chunks = [replace(chunk, chunk=n) for n in range(20)]
    first = [tuple(s.tokens for s in group) for group in estep.run(chunks, 4)]
    assert [tuple(s.tokens for s in g) for g in build(enumerable).run(chunks, 4)] == first
    assert len(set(first)) > 10
    for other in (build(enumerable, seed=2), build(enumerable, purpose="evaluate")):
        assert [tuple(s.tokens for s in group) for group in other.run(chunks, 4)] != first
    renamed = [replace(chunk, doc_id="other") for chunk in chunks]
    assert [tuple(s.tokens for s in group) for group in estep.run(renamed, 4)] != first


class ConstantSampler:
    """A sampler of equal draws, so that only the random number of the selection decides."""

    def sample(
        self,
        prompts: Sequence[TokenIds],
        keys: Sequence[SampleKey],
        num_samples: int,
        first_index: int = 0,
    ) -> list[list[Draw]]:
        assert first_index == 0
        assert len(keys) == len(prompts)
        return [[Draw((1,), "stop", -1.0)] * num_samples for _ in prompts]


def test_selection_depends_on_seed_purpose_document_and_chunk(enumerable: tiny.Tiny) -> None:
    """Evaluation must not repeat the choices of training, nor one chunk those of another."""
    chunks = [replace(CASES["a context"], chunk=n) for n in range(40)]
    renamed = [replace(chunk, doc_id="other") for chunk in chunks]

    def selected(estep: EStep, chunks: list[ChunkInContext]) -> tuple[int, ...]:
        estep.sampler = ConstantSampler()
        return tuple([s.selected for s in group].index(True) for group in estep.run(chunks, 4))

    first = selected(build(enumerable), chunks)
    others = [selected(build(enumerable, seed=2), chunks), selected(build(enumerable), renamed)]
    others.append(selected(build(enumerable, purpose="evaluate"), chunks))
    assert selected(build(enumerable), chunks) == first
    assert set(first) == {0, 1, 2, 3}
    assert len({first, *others}) == 4


def test_a_larger_k_extends_a_smaller_one(estep: EStep) -> None:
    """Bounds for a smaller K come from the same table."""
    chunks = list(CASES.values())
    eight = [[s.tokens for s in group[:4]] for group in estep.run(chunks, 8)]
    assert [[s.tokens for s in group] for group in estep.run(chunks, 4)] == eight


def test_samples_identify_their_chunk(enumerable: tiny.Tiny, estep: EStep) -> None:
    """Later stages join tables by these columns; the text is the decoded token ids."""
    groups = estep.run(list(CASES.values()), 5)
    for chunk, group in zip(CASES.values(), groups, strict=True):
        assert [(s.doc_id, s.chunk, s.sample) for s in group] == [
            (chunk.doc_id, chunk.chunk, k) for k in range(5)
        ]
        assert all(s.latent == enumerable.coder.decode(list(s.tokens)) for s in group)
