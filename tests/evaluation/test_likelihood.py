"""Likelihood measures: the same numbers from a few lines of float64, and honest errors."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.evaluation import likelihood
from boltlm.evaluation.likelihood import bounds, documents_of, ratio, raw_nll, raw_scores
from boltlm.records import Chunk, Sample
from tests import exact, tiny


def sample(doc_id: str, chunk: int, k: int, parts: tuple[float, float, float] | None) -> Sample:
    """A draw with (log q, log p(Z), log p(X)), or one that failed."""
    log_q, log_p_latent, log_p_text = parts or (-9.0, math.nan, math.nan)
    return Sample(
        doc_id=doc_id, chunk=chunk, sample=k, latent="", tokens=(1,),
        finish="stop" if parts else "length",
        log_q=log_q, log_p_latent=log_p_latent, log_p_text=log_p_text,
        log_weight=log_p_latent + log_p_text - log_q if parts else -math.inf, selected=False,
    )  # fmt: skip


def drawn(documents: int, draws: int, fail: float) -> tuple[list[list[Sample]], list[int]]:
    """Random draws for documents of one to three chunks, of which a share failed."""
    rng = np.random.default_rng(7)
    groups, lengths = [], []
    for d in range(documents):
        for c in range(1 + d % 3):
            parts = rng.normal([-10, -12, -30], [2, 3, 5], size=(draws, 3))
            groups.append(
                [
                    sample(f"d{d}", c, k, None if rng.random() < fail else tuple(parts[k]))
                    for k in range(draws)
                ]
            )
            lengths.append(int(rng.integers(3, 40)))
    return groups, lengths


def delta(above: Sequence[float], below: Sequence[float]) -> float:
    """The delta method's standard error of Σ above / Σ below over documents."""
    n, value = len(above), sum(above) / sum(below)
    squares = sum((a - value * b) ** 2 for a, b in zip(above, below, strict=True))
    return math.sqrt(n / (n - 1) * squares) / sum(below)


@pytest.mark.parametrize("fail", [0.0, 0.4])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_bounds_equal_a_plain_recomputation(fail: float, size: int) -> None:
    """SPEC 5: IWAE_K of disjoint sets of K draws, the mean of a chunk's finite ones, pooled over
    raw tokens; the share of sets in which all failed stands beside it."""
    groups, lengths = drawn(20, 4, fail)
    above: dict[str, float] = {}
    below: dict[str, float] = {}
    sets = failed = 0
    for group, length in zip(groups, lengths, strict=True):
        found = []
        for start in range(0, 4 - size + 1, size):
            weights = [math.exp(s.log_weight) for s in group[start : start + size]]
            sets += 1
            failed += sum(weights) == 0
            if sum(weights) > 0:
                found.append(math.log(sum(weights) / size))
        doc = group[0].doc_id
        above[doc] = above.get(doc, 0.0) + (sum(found) / len(found) if found else 0.0)
        below[doc] = below.get(doc, 0.0) + (length if found else 0.0)
    measured = bounds(groups, lengths, [size])
    name = f"elbo_per_token_k{size}"
    assert measured[name] == pytest.approx(sum(above.values()) / sum(below.values()), rel=1e-12)
    error = delta(list(above.values()), list(below.values()))
    assert measured[f"{name}_se"] == pytest.approx(error, rel=1e-9)
    assert measured[f"elbo_failed_fraction_k{size}"] == pytest.approx(failed / sets)
    assert measured["elbo_per_token"] == measured[name]
    assert (failed > 0) == (fail > 0)


def test_the_parts_sum_to_the_bound_of_one_draw() -> None:
    """SPEC 5: utility + simplicity + diversity is the K = 1 ELBO, nats a chunk."""
    groups, lengths = drawn(20, 4, 0.0)
    measured = bounds(groups, lengths, [1, 4])
    parts = [measured[name] for name in ("utility", "simplicity", "diversity")]
    assert sum(parts) == pytest.approx(np.mean([s.log_weight for g in groups for s in g]))
    total = measured["elbo_per_token_k1"] * sum(lengths)
    assert sum(parts) * len(groups) == pytest.approx(total)
    assert measured["elbo_per_token_k4"] > measured["elbo_per_token_k1"]
    assert measured["elbo_per_token"] == measured["elbo_per_token_k4"]


def test_the_parts_are_of_what_they_say() -> None:
    """A swapped column or sign would cancel in the sum above; chunks weigh alike, whatever
    failed in them."""
    groups = [
        [sample("a", 0, 0, (-1.0, -2.0, -4.0)), sample("a", 0, 1, (-3.0, -4.0, -8.0))],
        [sample("b", 0, 0, None), sample("b", 0, 1, (-10.0, -20.0, -40.0))],
        [sample("b", 1, 0, None), sample("b", 1, 1, None)],
    ]
    measured = bounds(groups, [5, 6, 7], [2])
    assert measured["utility"] == pytest.approx((-6.0 - 40.0) / 2)
    assert measured["simplicity"] == pytest.approx((-3.0 - 20.0) / 2)
    assert measured["diversity"] == pytest.approx((2.0 + 10.0) / 2)
    assert measured["elbo_failed_fraction_k2"] == pytest.approx(1 / 3)
    first = math.log((math.exp(-5.0) + math.exp(-9.0)) / 2)
    second = -50.0 - math.log(2)
    assert measured["elbo_per_token"] == pytest.approx((first + second) / (5 + 6))


@given(
    above=st.lists(st.floats(-50, 0), min_size=2, max_size=12),
    scale=st.floats(0.1, 10),
)
def test_ratio_is_pooled(above: list[float], scale: float) -> None:
    """Σ/Σ, not the mean of ratios: a short document must not weigh as much as a long one. The
    error is in the same unit and does not depend on the order."""
    below = np.arange(1.0, len(above) + 1)
    value, error = ratio(np.array(above), below)
    assert value == pytest.approx(sum(above) / below.sum())
    assert error == pytest.approx(delta(above, below.tolist()), abs=1e-12)
    scaled = ratio(scale * np.array(above), below)
    assert scaled == pytest.approx((scale * value, scale * error), abs=1e-9)
    assert ratio(np.array(above)[::-1], below[::-1]) == pytest.approx((value, error), abs=1e-9)


def test_the_standard_error_is_a_bootstraps() -> None:
    """Within 10 % of resampling 400 documents whose lengths and losses go together."""
    rng = np.random.default_rng(3)
    below = rng.integers(5, 200, size=400).astype(float)
    above = -below * rng.normal(2.0, 0.3, size=400) - rng.normal(0, 8, size=400)
    _, error = ratio(above, below)
    picks = rng.integers(0, 400, size=(4000, 400))
    resampled = above[picks].sum(1) / below[picks].sum(1)
    assert error == pytest.approx(resampled.std(ddof=1), rel=0.1)
    assert error != pytest.approx((above / below).std(ddof=1) / 20, rel=0.1)


def test_one_document_has_no_error() -> None:
    """Not 0: nothing is known about the spread."""
    value, error = ratio(np.array([-6.0]), np.array([3.0]))
    assert value == -2.0
    assert math.isnan(error)


WINDOW = 9


@pytest.fixture(scope="module")
def documents() -> dict[str, list[int]]:
    """Lengths around the borders of windows of eight tokens behind one."""
    rng = np.random.default_rng(5)
    lengths = (1, 7, 8, 9, 16, 17, 30)
    return {f"d{n}": rng.choice(tiny.ORDINARY, size=n).tolist() for n in lengths}


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_raw_nll_equals_a_plain_recomputation(
    enumerable: tiny.Tiny, documents: dict[str, list[int]], batch_tokens: int
) -> None:
    """−log p of the text after BOS, EOS left out; beyond the window each further window begins
    with the token before it."""
    slow, m = exact.double(enumerable.model), enumerable.markers
    sums = []
    for tokens in documents.values():
        total, place = 0.0, 0
        while place < len(tokens):
            before = m.bos if place == 0 else tokens[place - 1]
            total -= exact.log_probs(slow, [before], tokens[place : place + WINDOW - 1]).sum()
            place += WINDOW - 1
        sums.append(total)
    lengths = [len(tokens) for tokens in documents.values()]
    measured = raw_nll(raw_scores(enumerable.model, m, documents, WINDOW, batch_tokens))
    assert measured["nll_per_token"] == pytest.approx(sum(sums) / sum(lengths), abs=1e-5)
    assert measured["nll_per_token_se"] == pytest.approx(delta(sums, lengths), rel=1e-3)
    whole = raw_nll(raw_scores(enumerable.model, m, documents, tiny.WINDOW, batch_tokens))
    unbroken = [-exact.log_probs(slow, [m.bos], tokens).sum() for tokens in documents.values()]
    assert whole["nll_per_token"] == pytest.approx(sum(unbroken) / sum(lengths), abs=1e-5)
    assert abs(whole["nll_per_token"] - measured["nll_per_token"]) > 1e-3


def test_windows_score_every_token_once(
    enumerable: tiny.Tiny, documents: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token is skipped or scored twice at a border, and no window is longer than the model's."""
    asked: list[tuple[list[int], list[int]]] = []

    def count(
        _: object, prefixes: list[list[int]], branches: list[list[list[int]]], __: int
    ) -> list[list[np.ndarray]]:
        asked.extend((p, list(group[0])) for p, group in zip(prefixes, branches, strict=True))
        return [[-np.ones(len(branch)) for branch in group] for group in branches]

    monkeypatch.setattr(likelihood, "token_log_probs", count)
    measured = raw_nll(raw_scores(enumerable.model, enumerable.markers, documents, WINDOW, 100))
    assert measured["nll_per_token"] == 1
    assert [token for _, branch in asked for token in branch] == [
        token for tokens in documents.values() for token in tokens
    ]
    assert all(len(prefix) == 1 and 1 <= len(branch) <= WINDOW - 1 for prefix, branch in asked)


def test_documents_are_their_chunks_joined() -> None:
    """The raw likelihood is of whole documents, in reading order."""
    chunks = [
        Chunk(doc_id=doc, chunk=n, text="", tokens=tokens)
        for doc, n, tokens in (("a", 0, (1, 2)), ("a", 1, (3,)), ("b", 0, (4,)))
    ]
    assert documents_of(chunks) == {"a": [1, 2, 3], "b": [4]}


def test_a_bound_of_nothing_is_not_a_number() -> None:
    """Where every draw of every chunk failed there is no bound, and no warning either."""
    assert np.isnan(ratio(np.zeros(3), np.zeros(3))).all()
