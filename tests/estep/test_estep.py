"""The E-step compared with an enumeration of every latent, for the model of tests/tiny.py.

With nine tokens there are 40 latents of up to three tokens. So Σ_Z q w, the frequencies of draws
and of selected draws, and the bounds are sums that are computed here in float64. Tolerances of
sampled means come from the exact variance.

Shapes: Z latents of the enumeration; K samples of a chunk.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from boltlm.estep.config import PAPER_OPTIONS
from boltlm.estep.contexts import ChunkInContext, forward_tokens
from boltlm.estep.estep import EStep
from boltlm.estep.importance import iwae_bound
from boltlm.estep.samplers import Draw, SampleKey, TransformersSampler
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


def build(enumerable: tiny.Tiny, *, seed: int = 1, purpose: str = "tests", **changes: Any) -> EStep:
    """An E-step; `changes` replace sampling settings, `sampler` and the options."""
    names = {field.name for field in fields(PAPER_OPTIONS)}
    others = {key: changes.pop(key) for key in ("sampler",) if key in changes}
    options = {key: changes.pop(key) for key in sorted(names & changes.keys())}
    return EStep(
        enumerable.model,
        enumerable.coder,
        tiny.sampling_config(**{"batch_tokens": 1 << 20, **changes}),
        max_latent_tokens=MAX_LATENT_TOKENS,
        seed=seed,
        purpose=purpose,
        options=replace(PAPER_OPTIONS, **options),
        **others,
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
            [
                reference.parts(model64, special, chunk.context, chunk.text, z, MAX_LATENT_TOKENS)
                for z in latents
            ],
        )
        for chunk in CASES.values()
    }


@pytest.fixture(scope="module")
def samples(estep: EStep) -> dict[ChunkInContext, list[Sample]]:
    """12,000 samples of each case."""
    return {chunk: estep.run([chunk], 12_000)[0] for chunk in CASES.values()}


class FixedSampler:
    """A sampler of given latents that reports another log q′ than theirs."""

    def __init__(self, latents: Sequence[tuple[int, ...]]) -> None:
        self.draws = [
            Draw(z, "stop" if len(z) < MAX_LATENT_TOKENS else "length", -1.0, np.nan)
            for z in latents
        ]

    def sample(
        self,
        prompts: Sequence[TokenIds],
        keys: Sequence[SampleKey],
        num_samples: int,
        first_index: int = 0,
    ) -> list[list[Draw]]:
        assert len(keys) == len(prompts)
        return [self.draws[first_index : first_index + num_samples] for _ in prompts]


@pytest.fixture(scope="module")
def rescored(
    enumerable: tiny.Tiny, tables: dict[ChunkInContext, Table]
) -> dict[ChunkInContext, list[Sample]]:
    """Every latent of each case, once, with log q′ by the scorer."""
    latents = reference.latents(tiny.ORDINARY, MAX_LATENT_TOKENS)
    estep = build(enumerable, sampler=FixedSampler(latents), rescore_q=True)
    return {chunk: estep.run([chunk], len(latents))[0] for chunk in tables}


def exp_of(samples: list[Sample], name: str) -> np.ndarray:
    return np.exp([getattr(sample, name) for sample in samples])


def test_the_model_is_hard_enough(
    tables: dict[ChunkInContext, Table], chunk: ChunkInContext
) -> None:
    """If weights hardly varied, if the model hardly ever drew a barred token or if latents of the
    maximum length were rare, faults could go unnoticed."""
    table = tables[chunk]
    assert table.log_w.std() > 0.5
    assert 0.6 < table.q_unmasked.sum() < 0.9
    assert table.q[table.forced].sum() > 0.05


def test_the_proposal_is_a_distribution_over_latents(
    tables: dict[ChunkInContext, Table],
    rescored: dict[ChunkInContext, list[Sample]],
    chunk: ChunkInContext,
) -> None:
    """docs/method.md, 4.2, by enumeration with the E-step's own numbers: Σ q′ = 1 exactly, so every
    draw is a latent; Σ q′ w = Σ p(Z, EoL | C) p(X | C, Z) over all latents within the limit, the
    identity that every bound relies on; and 1 − Σ q′ exp(log_allowed) is the probability that a
    draw from the model ends otherwise than by EoL within the limit."""
    table, every = tables[chunk], rescored[chunk]
    q = exp_of(every, "log_q")
    assert q.sum() == pytest.approx(1, abs=1e-5)
    assert table.q.sum() == pytest.approx(1, abs=1e-12)
    assert (q * exp_of(every, "log_weight")).sum() == pytest.approx(table.joint, rel=1e-4)
    assert (table.q * np.exp(table.log_w)).sum() == pytest.approx(table.joint, rel=1e-12)
    not_masked = (q * exp_of(every, "log_allowed")).sum()
    assert not_masked == pytest.approx(table.q_unmasked.sum(), abs=1e-5)


def test_the_mean_weight_is_the_marginal_likelihood(
    tables: dict[ChunkInContext, Table],
    samples: dict[ChunkInContext, list[Sample]],
    chunk: ChunkInContext,
) -> None:
    """The same two sums as means over samples. A wrong sign, prompt, shift or ending in either
    factor violates them."""
    table, drawn = tables[chunk], samples[chunk]
    allowed = table.q_unmasked / table.q
    for values, exact in (
        (exp_of(drawn, "log_weight"), np.exp(table.log_w)),
        (exp_of(drawn, "log_allowed"), allowed),
    ):
        mean = (table.q * exact).sum()
        standard_error = np.sqrt(((table.q * exact**2).sum() - mean**2) / len(drawn))
        assert standard_error < 0.02 * mean
        assert abs(values.mean() - mean) < 4 * standard_error


def test_weights_need_the_law_that_was_drawn_from(
    enumerable: tiny.Tiny, tables: dict[ChunkInContext, Table]
) -> None:
    """If sampler and scorer disagree, here by a scaled output layer, p/q′ with the sampler's q′ has
    the mean Σ p(Z, EoL | C) p(X | C, Z) all the same; with `rescore_q` it has another one."""
    chunk = CASES["a context"]
    table, special = tables[chunk], enumerable.special_tokens
    other = copy.deepcopy(enumerable.model)
    with torch.no_grad():
        other.lm_head.weight.mul_(0.8)
    model64 = reference.double(other)
    parts = [
        reference.parts(model64, special, chunk.context, chunk.text, z, MAX_LATENT_TOKENS)
        for z in table.latents
    ]
    q_Z, p_Z = Table(table.latents, parts).q, table.q * np.exp(table.log_w)
    sampler = TransformersSampler(other, special, MAX_LATENT_TOKENS, 1 << 20, seed=1)
    means = []
    for rescore_q, w_Z in ((False, p_Z / q_Z), (True, np.exp(table.log_w))):
        means.append((q_Z * w_Z).sum())
        standard_error = np.sqrt(((q_Z * w_Z**2).sum() - means[-1] ** 2) / 6000)
        estep = build(enumerable, sampler=sampler, rescore_q=rescore_q)
        w = exp_of(estep.run([chunk], 6000)[0], "log_weight")
        assert abs(w.mean() - means[-1]) < 4 * standard_error
    assert means[0] == pytest.approx(table.joint)
    assert abs(means[1] / means[0] - 1) > 0.1


def test_draws_have_the_frequencies_of_the_proposal(
    tables: dict[ChunkInContext, Table],
    samples: dict[ChunkInContext, list[Sample]],
    chunk: ChunkInContext,
) -> None:
    """χ² test over all 40 latents, at level 10⁻⁴: the temperature is 1, and no part of the
    distribution is cut off but the barred tokens."""
    table, drawn = tables[chunk], samples[chunk]
    counts = Counter(s.tokens for s in drawn)
    observed = np.array([counts[z] for z in table.latents])
    assert observed.sum() == len(drawn)
    assert reference.chi2(observed, table.q * len(drawn)) > 1e-4


def test_scores_are_those_of_hand_written_prompts(
    enumerable: tiny.Tiny,
    tables: dict[ChunkInContext, Table],
    samples: dict[ChunkInContext, list[Sample]],
    rescored: dict[ChunkInContext, list[Sample]],
    chunk: ChunkInContext,
) -> None:
    """docs/method.md, 4.1 and 4.2: EoL is counted in log p always and in log q′ unless it was
    forced, the mode tokens in neither. Every latent that was drawn, and all 40 rescored, within
    10⁻⁴ nats of the sums over prompts that were written by hand."""
    by_latent = dict(zip(tables[chunk].latents, tables[chunk].parts, strict=True))
    drawn = {s.tokens: s for s in samples[chunk]}
    assert np.exp([by_latent[tokens].log_q for tokens in drawn]).sum() > 0.999
    for sample in [*drawn.values(), *rescored[chunk]]:
        expected = by_latent[sample.tokens]
        assert sample.finish == ("length" if expected.is_forced else "stop")
        assert sample.log_q == pytest.approx(expected.log_q, abs=1e-4)
        log_q_unmasked = sample.log_q + sample.log_allowed
        assert log_q_unmasked == pytest.approx(expected.log_q_unmasked, abs=1e-4)
        assert sample.log_allowed <= 1e-6
        assert sample.log_p_latent == pytest.approx(expected.log_p_latent, abs=1e-4)
        assert sample.log_p_text == pytest.approx(expected.log_p_text, abs=1e-4)
        assert sample.log_weight == pytest.approx(expected.log_w, abs=3e-4)
    model64, m = reference.double(enumerable.model), enumerable.special_tokens
    mode_log_probs = reference.log_probs(model64, [m.bos, *chunk.context], [m.sol, m.prior])
    assert np.abs(mode_log_probs).min() > 0.01, "counting a mode token would go unnoticed"


def copies(chunk: ChunkInContext, count: int) -> list[ChunkInContext]:
    """The same chunk under different document ids, each with its own random numbers."""
    return [replace(chunk, doc_id=f"copy {n}") for n in range(count)]


def test_selected_draws_have_the_frequencies_of_the_weights(
    estep: EStep, tables: dict[ChunkInContext, Table], chunk: ChunkInContext
) -> None:
    """With K = 2, P(select Z) is a sum over pairs; χ² test over 4,000 chunks, at level 10⁻⁴.
    Selecting the first draw, the best one, or one uniformly fails."""
    table, count = tables[chunk], 4000
    q_Z, w_Z = table.q, np.exp(table.log_w)
    selected_Z = 2 * q_Z * (w_Z[:, None] / (w_Z[:, None] + w_Z) * q_Z).sum(1)
    groups = estep.run(copies(chunk, count), 2)
    assert all(sum(s.selected for s in group) == 1 for group in groups)
    counts = Counter(s.tokens for group in groups for s in group if s.selected)
    observed = [counts[z] for z in table.latents]
    assert reference.chi2(observed, selected_Z * count) > 1e-4
    best_Z = 2 * q_Z * ((w_Z[:, None] > w_Z) * q_Z).sum(1) + q_Z**2
    difference_Z = abs(best_Z - selected_Z)
    assert difference_Z.max() > 0.01, "selecting the best draw would go unnoticed"


def test_uniform_selection_differs_in_the_selection_alone(
    enumerable: tiny.Tiny, estep: EStep, tables: dict[ChunkInContext, Table]
) -> None:
    """The control has the same draws, and each is selected with probability 1/K: the frequencies of
    selected latents are those of q′, χ² test at level 10⁻⁴, which the weighted ones are not."""
    chunk = CASES["a context"]
    chunks, table = copies(chunk, 2000), tables[chunk]
    weighted = estep.run(chunks, 3)
    uniform = build(enumerable, selection="uniform").run(chunks, 3)
    p_values = []
    for groups in (uniform, weighted):
        counts = Counter(s.tokens for group in groups for s in group if s.selected)
        observed = [counts[z] for z in table.latents]
        p_values.append(reference.chi2(observed, table.q * len(chunks)))
    assert p_values[0] > 1e-4 > p_values[1]
    positions = Counter(s.sample for group in uniform for s in group if s.selected)
    assert reference.chi2([positions[k] for k in range(3)], [len(chunks) / 3] * 3) > 1e-4
    unselected = [[replace(s, selected=False) for s in group] for group in weighted]
    assert [[replace(s, selected=False) for s in group] for group in uniform] == unselected
    assert estep.run(chunks, 3, uniform) == weighted, "reused draws are selected anew"


def test_with_k_1_the_draw_is_selected(estep: EStep, chunk: ChunkInContext) -> None:
    """docs/method.md, 4.1: K = 1 trains on the model's own latents."""
    assert all(sample.selected for (sample,) in estep.run(copies(chunk, 300), 1))


def test_the_bound_rises_with_k(
    tables: dict[ChunkInContext, Table],
    samples: dict[ChunkInContext, list[Sample]],
    chunk: ChunkInContext,
) -> None:
    """E[IWAE_1] < E[IWAE_2] < log Σ p(Z, EoL | C) p(X | C, Z), summed over all latents and pairs of
    them; the means over samples agree with these sums within 4 standard errors."""
    table = tables[chunk]
    log_w_ZZ = np.logaddexp(table.log_w[:, None], table.log_w[None, :]) - np.log(2)
    pairs = (np.outer(table.q, table.q).ravel(), log_w_ZZ.ravel())
    log_w = np.array([s.log_weight for s in samples[chunk]])
    means = []
    for k, (probability, bound) in {1: (table.q, table.log_w), 2: pairs}.items():
        mean = (probability * bound).sum()
        variance = (probability * bound**2).sum() - mean**2
        sampled = iwae_bound(log_w.reshape(-1, k))
        assert abs(sampled.mean() - mean) < 4 * np.sqrt(variance / len(sampled))
        means.append(mean)
    assert means[0] + 0.05 < means[1] < np.log(table.joint)


def test_forward_tokens_by_hand(
    enumerable: tiny.Tiny, samples: dict[ChunkInContext, list[Sample]], chunk: ChunkInContext
) -> None:
    """Each prompt once; EoL with every latent, and the text once more with each."""
    drawn, special = samples[chunk][:3], enumerable.special_tokens
    posterior = len(reference.posterior_prompt(special, chunk.context, chunk.text))
    prior = len(reference.prior_prompt(special, chunk.context))
    ends = [len([*s.tokens, special.eol]) for s in drawn]
    usual = posterior + prior + 2 * sum(ends) + 3 * len(chunk.text)
    assert forward_tokens(special, chunk, drawn) == usual
    first = drawn[1:]
    with_prior = [*first, replace(drawn[0], source="prior")]
    assert forward_tokens(special, chunk, with_prior) == usual + prior + sum(ends)
    with_previous = [*first, replace(drawn[0], source="previous")]
    cross = posterior + sum(len([*s.tokens, special.eol]) for s in first)
    assert forward_tokens(special, chunk, with_previous) == usual + cross
    assert forward_tokens(special, chunk, [*first, replace(drawn[0], source="retained")]) == usual


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


def test_selection_depends_on_seed_purpose_document_and_chunk(enumerable: tiny.Tiny) -> None:
    """Evaluation must not repeat the choices of training, nor one chunk those of another."""
    chunks = [replace(CASES["a context"], chunk=n) for n in range(40)]
    renamed = [replace(chunk, doc_id="other") for chunk in chunks]

    def selected(estep: EStep, chunks: list[ChunkInContext]) -> tuple[int, ...]:
        estep.sampler = FixedSampler([(1,)] * 4)
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
