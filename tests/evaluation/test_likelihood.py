"""Likelihood measures against recomputations in a few lines of float64, and their errors."""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from boltlm.estep.config import DrawSettings
from boltlm.estep.contexts import ChunkInContext
from boltlm.evaluation import likelihood
from boltlm.evaluation.clustered_errors import ratio_estimate
from boltlm.evaluation.likelihood import (
    chunk_nlls,
    document_nlls,
    elbo_metrics,
    join_chunks,
    nll_metrics,
    score_documents,
)
from boltlm.records import Chunk, Document, Sample
from tests import reference, tiny


def sample(doc_id: str, chunk: int, k: int, parts: tuple[float, float, float]) -> Sample:
    """A sample with (log q, log p(Z), log p(X))."""
    log_q, log_p_latent, log_p_text = parts
    values: dict[str, Any] = dict.fromkeys((field.name for field in fields(Sample)), 0.0)
    values |= {"log_q": log_q, "log_p_latent": log_p_latent, "log_p_text": log_p_text}
    values |= {"log_weight": log_p_latent + log_p_text - log_q}
    return Sample(**{**values, "doc_id": doc_id, "chunk": chunk, "sample": k})


def random_groups(num_documents: int, num_samples: int) -> tuple[list[list[Sample]], list[int]]:
    """Random samples for documents of one to three chunks, and the chunks' lengths in tokens."""
    rng = np.random.default_rng(7)
    groups, lengths = [], []
    for d in range(num_documents):
        for c in range(1 + d % 3):
            parts = rng.normal([-10, -12, -30], [2, 3, 5], size=(num_samples, 3))
            groups.append([sample(f"d{d}", c, k, tuple(parts[k])) for k in range(num_samples)])
            lengths.append(int(rng.integers(3, 40)))
    return groups, lengths


CLUSTERS = {f"d{d}": f"c{d // 2}" for d in range(20)}  # of two documents each


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_bounds_equal_a_plain_recomputation(size: int) -> None:
    """docs/method.md, section 5: IWAE_K of disjoint groups of K samples, the mean of those of a
    chunk, pooled over tokens; the error is over clusters of documents."""
    groups, lengths = random_groups(20, 4)
    bounds_C = []
    for group in groups:
        bounds = []
        for start in range(0, 4 - size + 1, size):
            weights = [math.exp(s.log_weight) for s in group[start : start + size]]
            bounds.append(math.log(sum(weights) / size))
        bounds_C.append(sum(bounds) / len(bounds))
    metrics = elbo_metrics(groups, lengths, [size], CLUSTERS)
    name = f"elbo_per_token_k{size}"
    ratio = sum(bounds_C) / sum(lengths)
    assert metrics[name] == pytest.approx(ratio, rel=1e-12)
    residuals: dict[str, float] = {}
    for group, bound, length in zip(groups, bounds_C, lengths, strict=True):
        cluster = f"c{int(group[0].doc_id[1:]) // 2}"
        residuals[cluster] = residuals.get(cluster, 0.0) + bound - ratio * length
    error = math.sqrt(10 / 9 * sum(r**2 for r in residuals.values())) / sum(lengths)
    assert metrics[f"{name}_se"] == pytest.approx(error, rel=1e-9)
    assert metrics["elbo_per_token"] == metrics[name]
    assert metrics["elbo_per_token_se"] == metrics[f"{name}_se"]


def test_the_terms_sum_to_the_bound_of_one_sample() -> None:
    """Eq. (8): utility + simplicity + diversity is the ELBO with K = 1 in nats per chunk."""
    groups, lengths = random_groups(20, 4)
    metrics = elbo_metrics(groups, lengths, [1, 4], CLUSTERS)
    terms = [metrics[name] for name in ("utility", "simplicity", "diversity")]
    assert sum(terms) == pytest.approx(np.mean([s.log_weight for g in groups for s in g]))
    total = metrics["elbo_per_token_k1"] * sum(lengths)
    assert sum(terms) * len(groups) == pytest.approx(total)
    assert metrics["elbo_per_token_k4"] > metrics["elbo_per_token_k1"]
    assert metrics["elbo_per_token"] == metrics["elbo_per_token_k4"]


def test_each_term_has_its_column_and_sign() -> None:
    """A swapped column or sign would cancel in the sum above. Chunks have equal weights."""
    groups = [
        [sample("a", 0, 0, (-1.0, -2.0, -4.0)), sample("a", 0, 1, (-3.0, -4.0, -8.0))],
        [sample("b", 0, 0, (-10.0, -20.0, -40.0)), sample("b", 0, 1, (-10.0, -20.0, -40.0))],
    ]
    metrics = elbo_metrics(groups, [5, 6], [2], {"a": "a", "b": "b"})
    assert metrics["utility"] == pytest.approx((-6.0 - 40.0) / 2)
    assert metrics["simplicity"] == pytest.approx((-3.0 - 20.0) / 2)
    assert metrics["diversity"] == pytest.approx((2.0 + 10.0) / 2)
    first = math.log((math.exp(-5.0) + math.exp(-9.0)) / 2)
    assert metrics["elbo_per_token"] == pytest.approx((first - 50.0) / (5 + 6))


def test_the_terms_per_document_by_hand() -> None:
    """Sums over the chunks of a document, in whatever order their ids sort, then the mean over
    documents; the error is over clusters of documents, here {b} and {a, c}."""
    terms = {
        "b": [(-1.0, -2.0, -4.0), (-3.0, -4.0, -8.0)],
        "a": [(-10.0, -20.0, -40.0)],
        "c": [(-2.0, -2.0, -2.0), (-1.0, -1.0, -1.0), (-1.0, -3.0, -5.0)],
    }
    groups = [
        [sample(d, c, k, parts) for k in range(2)]
        for d, chunks in terms.items()
        for c, parts in enumerate(chunks)
    ]
    clusters = {"b": "first", "a": "second", "c": "second"}
    metrics = elbo_metrics(groups, [5] * len(groups), [1, 2], clusters)
    expected = {
        "utility": (-12.0, -40.0, -8.0),
        "simplicity": (-6.0, -20.0, -6.0),
        "diversity": (4.0, 10.0, 4.0),
        "elbo_k1": (-14.0, -50.0, -10.0),
    }
    for name, (b, a, c) in expected.items():
        mean = (a + b + c) / 3
        assert metrics[f"{name}_per_document"] == pytest.approx(mean)
        variance = 2 * ((b - mean) ** 2 + (a + c - 2 * mean) ** 2)
        error = metrics[f"{name}_per_document_se"]
        assert error == pytest.approx(math.sqrt(variance) / 3)


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
    expected = {}
    for doc_id, tokens in documents.items():
        nll, start = 0.0, 0
        while start < len(tokens):
            previous = special.bos if start == 0 else tokens[start - 1]
            window = tokens[start : start + WINDOW - 1]
            nll -= reference.log_probs(model64, [previous], window).sum()
            start += WINDOW - 1
        expected[doc_id] = nll
    nlls = document_nlls(enumerable.model, special, documents, WINDOW, batch_tokens)
    assert nlls == pytest.approx(expected, abs=1e-4)
    context_length = enumerable.coder.context_length
    one_window = document_nlls(enumerable.model, special, documents, context_length, batch_tokens)
    assert one_window == pytest.approx(
        {
            doc_id: -reference.log_probs(model64, [special.bos], tokens).sum()
            for doc_id, tokens in documents.items()
        },
        abs=1e-4,
    )
    assert abs(one_window["d30"] - nlls["d30"]) > 1e-3


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
    nlls = document_nlls(enumerable.model, enumerable.special_tokens, documents, WINDOW, 100)
    assert nlls == {doc_id: len(tokens) for doc_id, tokens in documents.items()}
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


CHUNKS = [
    Chunk(doc_id=doc_id, chunk=index, text="", tokens=tokens)
    for doc_id, texts in {"a": [(1, 4), (7,), (4, 4, 1)], "b": [(4, 1)]}.items()
    for index, tokens in enumerate(texts)
]


@pytest.mark.parametrize("has_latents", [True, False])
def test_the_likelihood_of_chunks_in_context(enumerable: tiny.Tiny, has_latents: bool) -> None:
    """Eq. (13): after the empty pair of marks for a model with latents, else directly after the
    context, which is that of the bound."""
    model64, special = reference.double(enumerable.model), enumerable.special_tokens
    chunks = [
        ChunkInContext("a", 0, (), (1, 4)),
        ChunkInContext("a", 1, (1, 4), (7,)),
        ChunkInContext("b", 0, (7, 7), (4, 4, 1)),
    ]
    expected = {"a": 0.0, "b": 0.0}
    for chunk in chunks:
        marks = [special.sol, special.eol] if has_latents else []
        prompt = [special.bos, *chunk.context, *marks]
        expected[chunk.doc_id] -= reference.log_probs(model64, prompt, list(chunk.text)).sum()
    nlls = chunk_nlls(enumerable.model, special, chunks, has_latents, 1000)
    assert nlls == pytest.approx(expected, abs=1e-4)


def test_the_scores_of_documents(enumerable: tiny.Tiny) -> None:
    """Both likelihoods by document. Without latents, and with the whole document as context, they
    are equal by the chain rule; a shorter context makes another measure. A document without a
    cluster is its own."""
    settings = DrawSettings(
        seed=1, context_chunks=9, max_latent_tokens=8, sampling=tiny.sampling_config()
    )
    documents = [
        Document(doc_id="a", text="", source="t", cluster="book"),
        Document(doc_id="b", text="", source="t"),
    ]

    def scores(settings: DrawSettings, **changes: Any) -> list[likelihood.DocumentScore]:
        arguments: dict[str, Any] = {"has_latents": False, **changes}
        model, coder = enumerable.model, enumerable.coder
        return score_documents(model, coder, settings, documents, CHUNKS, **arguments)

    rows = scores(settings)
    assert [(row.doc_id, row.cluster, row.tokens) for row in rows] == [
        ("a", "book", 6), ("b", "b", 2),
    ]  # fmt: skip
    assert [row.nll_in_context for row in rows] == pytest.approx([row.nll for row in rows])
    for other in (scores(replace(settings, context_chunks=1)), scores(settings, has_latents=True)):
        assert other[0].nll == pytest.approx(rows[0].nll)
        assert abs(other[0].nll_in_context - rows[0].nll) > 1e-3
    metrics = nll_metrics(rows)
    nll_D, tokens_D = np.array([row.nll for row in rows]), np.array([6.0, 2.0])
    value, error, _ = ratio_estimate(nll_D, tokens_D, ["book", "b"])
    assert (metrics["nll_per_token"], metrics["nll_per_token_se"]) == (value, error)
    counts = [metrics[f"heldout_{name}"] for name in ("documents", "tokens", "clusters")]
    assert counts == [2, 8, 2]
