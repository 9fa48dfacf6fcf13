"""The options of the E-step (docs/method.md, 4.5 and 4.6) compared with enumerations.

The model of tests/tiny.py has 40 latents of up to three tokens, so laws, weights and expectations
are sums in float64. Tolerances of sampled means come from their variance.

Shape suffixes: Z latents of the enumeration; N copies of a chunk or document;
C chunks of a document; K samples of a chunk.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from boltlm.errors import UserError
from boltlm.estep.config import PAPER_OPTIONS, EStepOptions, EStepSettings
from boltlm.estep.contexts import ChunkInContext, forward_tokens
from boltlm.estep.diagnostics import WeightDiagnostics
from boltlm.estep.estep import EStep
from boltlm.estep.importance import iwae_bound, systematic_resample
from boltlm.estep.mixture import PreviousDraws
from boltlm.estep.smc import run_smc, smc_forward_tokens
from boltlm.params import build_settings, load
from boltlm.records import Chunk, Sample
from tests import reference, tiny

LIMIT = 3  # maximum number of tokens of a latent
CHUNK = ChunkInContext("d", 1, (1, 4), (7,))
LATENTS = reference.latents(tiny.ORDINARY, LIMIT)
INDEX = {latent: index for index, latent in enumerate(LATENTS)}


def build(model: PreTrainedModel, coder: Any, **options: Any) -> EStep:
    """An E-step with the paper's options but for `options`."""
    return EStep(
        model,
        coder,
        tiny.sampling_config(batch_tokens=1 << 20),
        max_latent_tokens=LIMIT,
        seed=1,
        purpose="tests",
        options=replace(PAPER_OPTIONS, **options),
    )


def copies(count: int) -> list[ChunkInContext]:
    """The same chunk under different document ids, each with its own random numbers."""
    return [replace(CHUNK, doc_id=f"copy {n}") for n in range(count)]


@dataclass(frozen=True)
class Laws:
    """Of every latent of CHUNK: the joint probability p(Z, X | C), its density under q′ at
    temperatures 1 and 2, under the masked prior, and under the q′ of another model."""

    joint: np.ndarray
    proposal: np.ndarray
    hot: np.ndarray
    prior: np.ndarray
    other: np.ndarray

    @property
    def posterior(self) -> np.ndarray:
        return self.joint / self.joint.sum()


@pytest.fixture(scope="module")
def other(enumerable: tiny.Tiny) -> PreTrainedModel:
    """Another model: that of the iteration before."""
    model = copy.deepcopy(enumerable.model)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    return model


@pytest.fixture(scope="module")
def laws(enumerable: tiny.Tiny, other: PreTrainedModel) -> Laws:
    special = enumerable.special_tokens
    model64, other64 = reference.double(enumerable.model), reference.double(other)
    posterior = reference.posterior_prompt(special, CHUNK.context, CHUNK.text)
    prior = reference.prior_prompt(special, CHUNK.context)

    def densities(model: PreTrainedModel, prompt: list[int], temperature: float = 1) -> np.ndarray:
        law = [
            reference.log_proposal(model, special, prompt, z, LIMIT, temperature) for z in LATENTS
        ]
        assert np.exp(law).sum() == pytest.approx(1, abs=1e-12)
        return np.exp(law)

    joint = [
        reference.log_probs(model64, prior, [*z, special.eol, *CHUNK.text]).sum() for z in LATENTS
    ]
    return Laws(
        joint=np.exp(joint),
        proposal=densities(model64, posterior),
        hot=densities(model64, posterior, 2.0),
        prior=densities(model64, prior),
        other=densities(other64, posterior),
    )


def check_weights(groups: Sequence[Sequence[Sample]], weight_Z: np.ndarray) -> None:
    """Every stored weight is that of the enumeration, within 3e-4 nats, and many are checked."""
    seen: set[tuple[int, ...]] = set()
    for sample in itertools.chain(*groups):
        expected = np.log(weight_Z[INDEX[sample.tokens]])
        assert sample.log_weight == pytest.approx(expected, abs=3e-4)
        seen.add(sample.tokens)
    assert len(seen) > 20


def check_mean_weight(groups: Sequence[Sequence[Sample]], laws: Laws) -> None:
    """The mean weight of a chunk, over many chunks, is p(X | C) within 4 standard errors."""
    mean_N = np.exp([iwae_bound(np.array([s.log_weight for s in group])) for group in groups])
    error = mean_N.std() / np.sqrt(len(mean_N))
    assert error < 0.02 * laws.joint.sum()
    assert abs(mean_N.mean() - laws.joint.sum()) < 4 * error


def selected_counts(groups: Sequence[Sequence[Sample]]) -> list[int]:
    """How often each latent was selected; exactly one is in each group."""
    assert all(sum(s.selected for s in group) == 1 for group in groups)
    counts = Counter(s.tokens for group in groups for s in group if s.selected)
    return [counts[z] for z in LATENTS]


def test_a_mixture_with_the_prior(enumerable: tiny.Tiny, laws: Laws) -> None:
    """Eq. (16) with two draws from q′ and one from the prior: weights are those of the mixture,
    whose mean is p(X | C), whatever drew them, and the prior's draws have its law."""
    mixture_Z = (2 * laws.proposal + laws.prior) / 3
    weight_Z = laws.joint / mixture_Z
    assert (mixture_Z * weight_Z).sum() == pytest.approx(laws.joint.sum(), rel=1e-12)
    assert weight_Z.max() < 0.7 * (laws.joint / laws.proposal).max(), "defence has an effect"
    estep = build(enumerable.model, enumerable.coder, prior_draws=1)
    groups = estep.run(copies(3000), 3)
    assert [[s.source for s in group] for group in groups] == [["proposal"] * 2 + ["prior"]] * 3000
    check_weights(groups, weight_Z)
    check_mean_weight(groups, laws)
    counts = Counter(group[2].tokens for group in groups)
    assert reference.chi2([counts[z] for z in LATENTS], laws.prior * len(groups)) > 1e-4
    assert groups[0][2].log_q == pytest.approx(
        np.log(laws.proposal[INDEX[groups[0][2].tokens]]), abs=1e-4
    )


def test_draws_of_the_iteration_before(
    enumerable: tiny.Tiny, other: PreTrainedModel, laws: Laws
) -> None:
    """Multiple importance sampling, eq. (16): two new draws and three old ones. The mean weight is
    p(X | C); with each draw weighted by its own law alone it would vary more. Only own draws from
    the proposal are reused."""
    chunks = copies(2000)
    old = build(other, enumerable.coder, prior_draws=1).run(chunks, 4)
    by_chunk = {(group[0].doc_id, group[0].chunk): group for group in old}
    estep = build(enumerable.model, enumerable.coder, reuse="draws")
    groups = estep.run(chunks, 2, previous=PreviousDraws(by_chunk, other))
    sources = ["proposal"] * 2 + ["previous"] * 3
    assert all([s.source for s in group] == sources for group in groups)
    weight_Z = laws.joint / ((2 * laws.proposal + 3 * laws.other) / 5)
    check_weights(groups, weight_Z)
    check_mean_weight(groups, laws)
    own_laws = {"proposal": laws.proposal, "previous": laws.other}
    separate_N = [
        np.mean([(laws.joint / own_laws[s.source])[INDEX[s.tokens]] for s in g]) for g in groups
    ]
    mixed_N = [np.exp(iwae_bound(np.array([s.log_weight for s in group]))) for group in groups]
    assert np.std(mixed_N) < 0.95 * np.std(separate_N)
    for group, earlier in zip(groups[:50], old, strict=False):
        assert [s.tokens for s in group[2:]] == [s.tokens for s in earlier[:3]]
        assert group[4].log_q == pytest.approx(
            np.log(laws.proposal[INDEX[group[4].tokens]]), abs=1e-4
        )
    new = build(enumerable.model, enumerable.coder).run(chunks[:50], 2)
    assert [[s.tokens for s in g] for g in new] == [[s.tokens for s in g[:2]] for g in groups[:50]]


def test_iterated_resampling_leaves_the_posterior_invariant(
    enumerable: tiny.Tiny, laws: Laws
) -> None:
    """With one new draw the transition from z to y ≠ z has probability q′(y) w(y) / (w(y) + w(z)).
    By enumeration the posterior is invariant under it; selected latents have it after a step that
    began with it, χ² test at level 10⁻⁴, and have not after a step that began with q′."""
    weight_Z = laws.joint / laws.proposal
    move_ZZ = laws.proposal * weight_Z / (weight_Z + weight_Z[:, None])
    np.fill_diagonal(move_ZZ, 0)
    np.fill_diagonal(move_ZZ, 1 - move_ZZ.sum(1))
    np.testing.assert_allclose(laws.posterior @ move_ZZ, laws.posterior, rtol=1e-10)
    random, chunks = np.random.default_rng(0), copies(4000)
    estep = build(enumerable.model, enumerable.coder, reuse="selected")
    (some,) = estep.run(chunks[:1], 1)
    p_values = []
    for start_Z in (laws.posterior, laws.proposal):
        starts = random.choice(len(LATENTS), len(chunks), p=start_Z)
        previous = {
            (c.doc_id, c.chunk): [replace(some[0], tokens=LATENTS[z], selected=True)]
            for c, z in zip(chunks, starts, strict=True)
        }
        groups = estep.run(chunks, 1, previous=PreviousDraws(previous, None))
        assert all([s.source for s in group] == ["proposal", "retained"] for group in groups)
        check_weights(groups, weight_Z)
        observed = selected_counts(groups)
        assert reference.chi2(observed, start_Z @ move_ZZ * len(chunks)) > 1e-4
        p_values.append(reference.chi2(observed, laws.posterior * len(chunks)))
    assert p_values[0] > 1e-4 > p_values[1]


def test_more_draws_where_the_effective_sample_size_is_low(
    enumerable: tiny.Tiny, laws: Laws
) -> None:
    """Two draws, and one more where ESS < 0.8 · 2: the law of the selected latent is a sum over all
    triples. The mean weight is biased, by enumeration: it is no bound."""
    weight_Z = laws.joint / laws.proposal
    pair_ZZ = np.outer(laws.proposal, laws.proposal)
    total_ZZ = weight_Z[:, None] + weight_Z
    ess_ZZ = total_ZZ**2 / (weight_Z[:, None] ** 2 + weight_Z**2)
    is_low_ZZ = ess_ZZ < 0.8 * 2
    law_Z = 2 * (~is_low_ZZ * pair_ZZ * weight_Z[:, None] / total_ZZ).sum(1)
    share_ZZZ = pair_ZZ[:, :, None] * laws.proposal * is_low_ZZ[:, :, None]
    share_ZZZ = share_ZZZ / (total_ZZ[:, :, None] + weight_Z)
    law_Z = law_Z + weight_Z * (share_ZZZ.sum((1, 2)) + share_ZZZ.sum((0, 2)))
    law_Z = law_Z + weight_Z * share_ZZZ.sum((0, 1))
    assert law_Z.sum() == pytest.approx(1)
    mean = (~is_low_ZZ * pair_ZZ * total_ZZ / 2).sum()
    mean += (is_low_ZZ * pair_ZZ * (total_ZZ + laws.joint.sum()) / 3).sum()
    assert abs(mean / laws.joint.sum() - 1) > 0.01
    options = {"extra_draws": 1, "min_ess_fraction": 0.8}
    estep = build(enumerable.model, enumerable.coder, **options)
    groups = estep.run(copies(3000), 2)
    check_weights(groups, weight_Z)
    is_low = [is_low_ZZ[INDEX[g[0].tokens], INDEX[g[1].tokens]] for g in groups]
    assert [len(group) for group in groups] == [3 if low else 2 for low in is_low]
    assert 300 < sum(is_low) < 2700
    assert reference.chi2(selected_counts(groups), law_Z * len(groups)) > 1e-4
    plain = build(enumerable.model, enumerable.coder).run(copies(3000), 3)
    for group, extended in zip(plain, groups, strict=True):
        assert [s.tokens for s in extended] == [s.tokens for s in group][: len(extended)]


def test_temperature(enumerable: tiny.Tiny, laws: Laws) -> None:
    """Draws have the law of the divided logits, and the weights correct for it."""
    groups = build(enumerable.model, enumerable.coder, temperature=2.0).run(copies(3000), 2)
    counts = Counter(s.tokens for group in groups for s in group)
    assert reference.chi2([counts[z] for z in LATENTS], laws.hot * 6000) > 1e-4
    assert reference.chi2([counts[z] for z in LATENTS], laws.proposal * 6000) < 1e-4
    check_weights(groups, laws.joint / laws.hot)
    check_mean_weight(groups, laws)


def test_the_best_draw(enumerable: tiny.Tiny) -> None:
    """Selection `best` differs from the weighted one in the selection alone."""
    weighted = build(enumerable.model, enumerable.coder).run(copies(200), 4)
    best = build(enumerable.model, enumerable.coder, selection="best").run(copies(200), 4)
    for group, other_group in zip(best, weighted, strict=True):
        (chosen,) = [s for s in group if s.selected]
        assert chosen.log_weight == max(s.log_weight for s in group)
        unselected = [replace(s, selected=False) for s in other_group]
        assert [replace(s, selected=False) for s in group] == unselected


FIRST, SECOND = (1, 4), (7,)  # the chunks of a document


def documents(count: int) -> list[Chunk]:
    return [
        Chunk(doc_id=f"copy {n}", chunk=index, text="", tokens=tokens)
        for n in range(count)
        for index, tokens in enumerate((FIRST, SECOND))
    ]


@pytest.fixture(scope="module")
def document_joint(enumerable: tiny.Tiny) -> np.ndarray:
    """p(Z_1, X_1, Z_2, X_2), in float64: the second chunk follows SoL Prior Z_1 EoL X_1."""
    special, model64 = enumerable.special_tokens, reference.double(enumerable.model)
    rows = []
    for first in LATENTS:
        piece = [*first, special.eol, *FIRST]
        log_first = reference.log_probs(model64, reference.prior_prompt(special, ()), piece).sum()
        context = [special.sol, special.prior, *piece]
        prompt = reference.prior_prompt(special, context)
        rows.append(
            [
                log_first + reference.log_probs(model64, prompt, [*z, special.eol, *SECOND]).sum()
                for z in LATENTS
            ]
        )
    return np.exp(rows)


def smc(estep: EStep, count: int, num_particles: int) -> list[list[list[Sample]]]:
    """Of each document, the samples of its two chunks."""
    groups = run_smc(
        estep, documents(count), num_particles, context_chunks=3, token_budget=tiny.CONTEXT_LENGTH
    )
    return [groups[index : index + 2] for index in range(0, len(groups), 2)]


def test_smc_estimates_the_evidence_of_a_document(
    enumerable: tiny.Tiny, document_joint: np.ndarray
) -> None:
    """The product over chunks of the mean weights has the mean p(X_1, X_2), summed over all pairs
    of latents, for two particles; the selected latents of many particles have nearly the posterior
    of the document, χ² test at level 10⁻⁴, which those of one particle have not."""
    estep = build(enumerable.model, enumerable.coder, method="smc")
    log_w_NCK = np.array(
        [[[s.log_weight for s in group] for group in d] for d in smc(estep, 3000, 2)]
    )
    evidence_N = np.exp(iwae_bound(log_w_NCK).sum(1))
    exact, error = document_joint.sum(), evidence_N.std() / np.sqrt(len(evidence_N))
    assert error < 0.03 * exact
    assert abs(evidence_N.mean() - exact) < 4 * error
    posterior_ZZ = document_joint / exact
    p_values = []
    for num_particles in (32, 1):
        counts = Counter(
            tuple(s.tokens for group in document for s in group if s.selected)
            for document in smc(estep, 600, num_particles)
        )
        observed = np.array([counts[pair] for pair in itertools.product(LATENTS, LATENTS)])
        assert observed.sum() == 600, "one latent of each chunk is selected"
        p_values.append(reference.chi2(observed, posterior_ZZ.ravel() * 600))
    assert p_values[0] > 1e-4 > p_values[1]


def test_smc_contexts_have_the_latents_of_the_ancestors(enumerable: tiny.Tiny) -> None:
    """The weights of the second chunk are those in the context of the particle's ancestor, the
    selected samples are one particle's, and tokens are counted by hand."""
    special, model64 = enumerable.special_tokens, reference.double(enumerable.model)
    estep = build(enumerable.model, enumerable.coder, method="smc")
    total, results = 0, smc(estep, 10, 4)
    for first, second in results:
        assert [s.ancestor for s in first] == [None] * 4
        assert [s.sample for s in second] == list(range(4))
        (chosen,) = [s for s in second if s.selected]
        assert chosen.ancestor is not None
        assert first[chosen.ancestor].selected
        for group, text in ((first, FIRST), (second, SECOND)):
            for s in group:
                context: list[int] = []
                if s.ancestor is not None:
                    latent = first[s.ancestor].tokens
                    context = [special.sol, special.prior, *latent, special.eol, *FIRST]
                parts = reference.parts(model64, special, context, text, s.tokens, LIMIT)
                assert s.log_weight == pytest.approx(parts.log_w, abs=3e-4)
                assert s.log_q == pytest.approx(parts.log_q, abs=1e-4)
                chunk = ChunkInContext("d", 0, tuple(context), text)
                total += forward_tokens(special, chunk, [s])
    groups = [group for document in results for group in document]
    options = {"context_chunks": 3, "token_budget": tiny.CONTEXT_LENGTH}
    assert smc_forward_tokens(special, documents(10), groups, **options) == total
    shorter = run_smc(estep, documents(3), 4, context_chunks=0, token_budget=tiny.CONTEXT_LENGTH)
    for s in shorter[1]:
        parts = reference.parts(model64, special, (), SECOND, s.tokens, LIMIT)
        assert s.log_weight == pytest.approx(parts.log_w, abs=3e-4)


def test_systematic_resampling() -> None:
    """Each index occurs K ŵ times up to one, and exactly so on average over the points."""
    weights_K = np.array([0.5, 0.05, 0.0, 0.45])
    points = (np.arange(4000) + 0.5) / 4000
    counts = np.array([np.bincount(systematic_resample(weights_K, u), minlength=4) for u in points])
    assert (abs(counts - 4 * weights_K) < 1).all()
    np.testing.assert_allclose(counts.mean(0), 4 * weights_K, atol=1e-3)
    assert systematic_resample(np.ones(1), 0.999).tolist() == [0]


def test_diagnostics_of_a_pool() -> None:
    """Shares of draws cover the model's own; the bound leaves out the retained latent."""
    values: dict[str, Any] = {field.name: 0.0 for field in fields(Sample)}
    values |= {"doc_id": "d", "latent": "7", "finish": "stop", "tokens": (1,), "selected": False}
    own = Sample(**{**values, "source": "proposal", "log_weight": -2.0})
    kept = Sample(
        **{
            **values,
            "source": "retained",
            "log_weight": 3.0,
            "log_allowed": np.nan,
            "latent": "8",
            "selected": True,
        }
    )
    diagnostics = WeightDiagnostics([[own, own, kept]], {("d", 0.0): "7"})  # pyright: ignore
    metrics = diagnostics.diagnostics()
    assert (metrics["samples"], metrics["candidates"]) == (2, 3)
    assert metrics["masked_mass"] == 0
    assert metrics["selected_earlier_fraction"] == 1
    assert diagnostics.sums["log_mean_weight"] == pytest.approx(-2)
    matches = diagnostics.exact_match_metrics()
    assert (matches["exact_match"], matches["exact_match_selected"]) == (1, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"min_ess_fraction": 1.5}, "min_ess_fraction"),
        ({"extra_draws": 2, "k_samples": 1}, "extra_draws needs K of 2 or more"),
        ({"prior_draws": 4}, r"prior_draws must be below K \(4\)"),
        ({"method": "smc"}, "needs sequences.layout document"),
        ({"method": "smc", "reuse": "draws"}, "method smc needs"),
        ({"reuse": "selected", "prior_draws": 1}, "posterior invariant"),
        ({"reuse": "selected", "extra_draws": 1}, "posterior invariant"),
        ({"selection": "uniform", "reuse": "draws"}, "selection uniform needs"),
        ({"reuse": "draws", "previous_model": "em1"}, "same model, here em1"),
        ({"selection": "worst"}, "weighted | uniform | best"),
    ],
)
def test_options_that_do_not_fit_together(options: dict[str, Any], message: str) -> None:
    params = load(tiny.ROOT / "params.yaml")
    entry = params["latents"]["em2"]
    for key in entry.keys() & options.keys():
        entry[key] = options[key]
    entry["estep"] = {key: value for key, value in options.items() if key not in entry}
    with pytest.raises(UserError, match=message):
        build_settings(EStepSettings, params, name="em2")


def test_vllm_does_not_draw_at_other_temperatures() -> None:
    params = load(tiny.ROOT / "params.yaml")
    params["sampling"]["sampler"] = "vllm"
    params["estep"]["temperature"] = 1.5
    with pytest.raises(UserError, match=r"needs sampling\.sampler transformers"):
        build_settings(EStepSettings, params, name="em2")
    params["sampling"]["sampler"] = "transformers"
    assert build_settings(EStepSettings, params, name="em2").options.temperature == 1.5


def test_the_defaults_are_the_paper_s() -> None:
    """Bounds use PAPER_OPTIONS, and the sections `estep` of all files state the same; the first
    iteration has nothing to reuse."""
    for path in [tiny.ROOT / "params.yaml", *sorted((tiny.ROOT / "presets").glob("paper-*.yaml"))]:
        assert EStepOptions(**load(path)["estep"]) == PAPER_OPTIONS
    params = load(tiny.ROOT / "params.yaml")
    params["estep"]["reuse"] = "draws"
    assert build_settings(EStepSettings, params, name="em1").options.reuse == "none"
    assert build_settings(EStepSettings, params, name="em2").options.reuse == "draws"
