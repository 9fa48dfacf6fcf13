"""Likelihood measures against recomputations in a few lines of float64, and their errors."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.evaluation import likelihood
from boltlm.evaluation.likelihood import (
    elbo_metrics,
    join_chunks,
    nll_metrics,
    ratio_estimate,
    score_documents,
)
from boltlm.records import Chunk, Sample
from tests import reference, tiny


def sample(doc_id: str, chunk: int, k: int, parts: tuple[float, float, float] | None) -> Sample:
    """A sample with (log q, log p(Z), log p(X)), or an invalid one."""
    log_q, log_p_latent, log_p_text = parts or (-9.0, math.nan, math.nan)
    return Sample(
        doc_id=doc_id, chunk=chunk, sample=k, latent="", tokens=(1,),
        finish="stop" if parts else "length",
        log_q=log_q, log_p_latent=log_p_latent, log_p_text=log_p_text,
        log_weight=log_p_latent + log_p_text - log_q if parts else -math.inf, selected=False,
    )  # fmt: skip


def random_groups(
    num_documents: int, num_samples: int, invalid_fraction: float
) -> tuple[list[list[Sample]], list[int]]:
    """Random samples for documents of one to three chunks, and the chunks' lengths in tokens."""
    rng = np.random.default_rng(7)
    groups, lengths = [], []
    for d in range(num_documents):
        for c in range(1 + d % 3):
            parts = rng.normal([-10, -12, -30], [2, 3, 5], size=(num_samples, 3))
            groups.append(
                [
                    sample(
                        f"d{d}", c, k, None if rng.random() < invalid_fraction else tuple(parts[k])
                    )
                    for k in range(num_samples)
                ]
            )
            lengths.append(int(rng.integers(3, 40)))
    return groups, lengths


def delta_error(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The delta method's standard error of Σ a / Σ b over documents, eq. (9)."""
    n, ratio = len(numerators), sum(numerators) / sum(denominators)
    squares = sum((a - ratio * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    return math.sqrt(n / (n - 1) * squares) / sum(denominators)


@pytest.mark.parametrize("invalid_fraction", [0.0, 0.4])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_bounds_equal_a_plain_recomputation(invalid_fraction: float, size: int) -> None:
    """docs/method.md, section 5: IWAE_K of disjoint groups of K samples, the mean of a chunk's
    finite ones, pooled over tokens; and the fraction of groups in which all samples are invalid."""
    groups, lengths = random_groups(20, 4, invalid_fraction)
    numerators: dict[str, float] = {}
    denominators: dict[str, float] = {}
    num_groups = num_failed = 0
    for group, length in zip(groups, lengths, strict=True):
        bounds = []
        for start in range(0, 4 - size + 1, size):
            weights = [math.exp(s.log_weight) for s in group[start : start + size]]
            num_groups += 1
            num_failed += sum(weights) == 0
            if sum(weights) > 0:
                bounds.append(math.log(sum(weights) / size))
        doc = group[0].doc_id
        bound = sum(bounds) / len(bounds) if bounds else 0.0
        numerators[doc] = numerators.get(doc, 0.0) + bound
        denominators[doc] = denominators.get(doc, 0.0) + (length if bounds else 0.0)
    metrics = elbo_metrics(groups, lengths, [size])
    name = f"elbo_per_token_k{size}"
    ratio = sum(numerators.values()) / sum(denominators.values())
    assert metrics[name] == pytest.approx(ratio, rel=1e-12)
    error = delta_error(list(numerators.values()), list(denominators.values()))
    assert metrics[f"{name}_se"] == pytest.approx(error, rel=1e-9)
    assert metrics[f"elbo_failed_fraction_k{size}"] == pytest.approx(num_failed / num_groups)
    assert metrics["elbo_per_token"] == metrics[name]
    assert (num_failed > 0) == (invalid_fraction > 0)


def test_the_terms_sum_to_the_bound_of_one_sample() -> None:
    """Eq. (8): utility + simplicity + diversity is the ELBO with K = 1 in nats per chunk."""
    groups, lengths = random_groups(20, 4, 0.0)
    metrics = elbo_metrics(groups, lengths, [1, 4])
    terms = [metrics[name] for name in ("utility", "simplicity", "diversity")]
    assert sum(terms) == pytest.approx(np.mean([s.log_weight for g in groups for s in g]))
    total = metrics["elbo_per_token_k1"] * sum(lengths)
    assert sum(terms) * len(groups) == pytest.approx(total)
    assert metrics["elbo_per_token_k4"] > metrics["elbo_per_token_k1"]
    assert metrics["elbo_per_token"] == metrics["elbo_per_token_k4"]


def test_each_term_has_its_column_and_sign() -> None:
    """A swapped column or sign would cancel in the sum above. Chunks have equal weights, however
    many of their samples are invalid."""
    groups = [
        [sample("a", 0, 0, (-1.0, -2.0, -4.0)), sample("a", 0, 1, (-3.0, -4.0, -8.0))],
        [sample("b", 0, 0, None), sample("b", 0, 1, (-10.0, -20.0, -40.0))],
        [sample("b", 1, 0, None), sample("b", 1, 1, None)],
    ]
    metrics = elbo_metrics(groups, [5, 6, 7], [2])
    assert metrics["utility"] == pytest.approx((-6.0 - 40.0) / 2)
    assert metrics["simplicity"] == pytest.approx((-3.0 - 20.0) / 2)
    assert metrics["diversity"] == pytest.approx((2.0 + 10.0) / 2)
    assert metrics["elbo_failed_fraction_k2"] == pytest.approx(1 / 3)
    first = math.log((math.exp(-5.0) + math.exp(-9.0)) / 2)
    second = -50.0 - math.log(2)
    assert metrics["elbo_per_token"] == pytest.approx((first + second) / (5 + 6))


@given(
    numerators=st.lists(st.floats(-50, 0), min_size=2, max_size=12),
    scale=st.floats(0.1, 10),
)
def test_the_ratio_is_pooled(numerators: list[float], scale: float) -> None:
    """Σ a / Σ b and not the mean of ratios: a short document must not count as much as a long one.
    The error has the same unit and does not depend on the order of the documents."""
    a, b = np.array(numerators), np.arange(1.0, len(numerators) + 1)
    ratio, error = ratio_estimate(a, b)
    assert ratio == pytest.approx(sum(numerators) / b.sum())
    assert error == pytest.approx(delta_error(numerators, b.tolist()), abs=1e-12)
    scaled = ratio_estimate(scale * a, b)
    assert scaled == pytest.approx((scale * ratio, scale * error), abs=1e-9)
    assert ratio_estimate(a[::-1], b[::-1]) == pytest.approx((ratio, error), abs=1e-9)


def test_the_standard_error_agrees_with_the_bootstrap() -> None:
    """Within 10 % of resampling 400 documents whose lengths and losses are correlated."""
    rng = np.random.default_rng(3)
    denominators = rng.integers(5, 200, size=400).astype(float)
    numerators = -denominators * rng.normal(2.0, 0.3, size=400) - rng.normal(0, 8, size=400)
    _, error = ratio_estimate(numerators, denominators)
    picks = rng.integers(0, 400, size=(4000, 400))
    resampled = numerators[picks].sum(1) / denominators[picks].sum(1)
    assert error == pytest.approx(resampled.std(ddof=1), rel=0.1)
    assert error != pytest.approx((numerators / denominators).std(ddof=1) / 20, rel=0.1)


def test_one_document_has_no_error() -> None:
    """NaN and not 0: a single document says nothing about the spread."""
    ratio, error = ratio_estimate(np.array([-6.0]), np.array([3.0]))
    assert ratio == -2.0
    assert math.isnan(error)


WINDOW = 9


@pytest.fixture(scope="module")
def documents() -> dict[str, list[int]]:
    """Documents whose lengths lie around multiples of the eight tokens that a window predicts."""
    rng = np.random.default_rng(5)
    lengths = (1, 7, 8, 9, 16, 17, 30)
    return {f"d{n}": rng.choice(tiny.ORDINARY, size=n).tolist() for n in lengths}


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_raw_nll_equals_a_plain_recomputation(
    enumerable: tiny.Tiny, documents: dict[str, list[int]], batch_tokens: int
) -> None:
    """−log p of the text after BOS, without EOS; beyond the context window, each further window
    begins with the token before it."""
    model64, special = reference.double(enumerable.model), enumerable.special_tokens
    nlls = []
    for tokens in documents.values():
        nll, start = 0.0, 0
        while start < len(tokens):
            previous = special.bos if start == 0 else tokens[start - 1]
            window = tokens[start : start + WINDOW - 1]
            nll -= reference.log_probs(model64, [previous], window).sum()
            start += WINDOW - 1
        nlls.append(nll)
    lengths = [len(tokens) for tokens in documents.values()]
    metrics = nll_metrics(
        score_documents(enumerable.model, special, documents, WINDOW, batch_tokens)
    )
    assert metrics["nll_per_token"] == pytest.approx(sum(nlls) / sum(lengths), abs=1e-5)
    assert metrics["nll_per_token_se"] == pytest.approx(delta_error(nlls, lengths), rel=1e-3)
    context_length = enumerable.coder.context_length
    one_window = nll_metrics(
        score_documents(enumerable.model, special, documents, context_length, batch_tokens)
    )
    nlls = [
        -reference.log_probs(model64, [special.bos], tokens).sum() for tokens in documents.values()
    ]
    assert one_window["nll_per_token"] == pytest.approx(sum(nlls) / sum(lengths), abs=1e-5)
    assert abs(one_window["nll_per_token"] - metrics["nll_per_token"]) > 1e-3


def test_windows_score_every_token_once(
    enumerable: tiny.Tiny, documents: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token is skipped or scored twice at a boundary, and no window exceeds the model's."""
    windows: list[tuple[list[int], list[int]]] = []

    def record_windows(
        _: object, prefixes: list[list[int]], branches: list[list[list[int]]], __: int
    ) -> list[list[np.ndarray]]:
        windows.extend((p, list(group[0])) for p, group in zip(prefixes, branches, strict=True))
        return [[-np.ones(len(branch)) for branch in group] for group in branches]

    monkeypatch.setattr(likelihood, "token_log_probs", record_windows)
    metrics = nll_metrics(
        score_documents(enumerable.model, enumerable.special_tokens, documents, WINDOW, 100)
    )
    assert metrics["nll_per_token"] == 1
    assert [token for _, branch in windows for token in branch] == [
        token for tokens in documents.values() for token in tokens
    ]
    assert all(len(prefix) == 1 and 1 <= len(branch) <= WINDOW - 1 for prefix, branch in windows)


def test_chunks_are_joined_to_documents() -> None:
    """The raw likelihood is that of complete documents, in reading order."""
    chunks = [
        Chunk(doc_id=doc, chunk=n, text="", tokens=tokens)
        for doc, n, tokens in (("a", 0, (1, 2)), ("a", 1, (3,)), ("b", 0, (4,)))
    ]
    assert join_chunks(chunks) == {"a": [1, 2, 3], "b": [4]}


def test_the_ratio_of_nothing_is_not_a_number() -> None:
    """Where all samples of all chunks are invalid there is no bound, and no warning either."""
    assert np.isnan(ratio_estimate(np.zeros(3), np.zeros(3))).all()
