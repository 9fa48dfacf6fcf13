"""Likelihood measures of a model on held-out text (docs/method.md, section 5).

Letters as in docs/method.md: X chunk, C context, Z latent, q proposal, p model, w weight, K samples
per chunk. Everything is in nats and pooled over documents; standard errors are over documents.

Shapes: C chunks of a corpus, D documents, K samples of a chunk, G groups of samples of a chunk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel

from boltlm.estep.importance import iwae_bound
from boltlm.estep.scoring import token_log_probs
from boltlm.records import Chunk, Sample
from boltlm.tokens import SpecialTokens


def ratio_estimate(numerators_D: np.ndarray, denominators_D: np.ndarray) -> tuple[float, float]:
    """The pooled ratio R = Σ a / Σ b over documents, and its standard error, eq. (9).

    Eq. (9), the delta method: SE² = D / (D − 1) · Σ (a − R b)² / (Σ b)². Both are NaN where Σ b is
    0, and the standard error is NaN for a single document.
    """
    if denominators_D.sum() == 0:
        return float("nan"), float("nan")
    ratio = numerators_D.sum() / denominators_D.sum()
    count = len(numerators_D)
    if count < 2:
        return float(ratio), float("nan")
    residuals_D = numerators_D - ratio * denominators_D
    variance = count / (count - 1) * (residuals_D**2).sum()
    return float(ratio), float(np.sqrt(variance) / denominators_D.sum())


def elbo_metrics(
    groups: Sequence[Sequence[Sample]], chunk_lengths: Sequence[int], sizes: Sequence[int]
) -> dict[str, float]:
    """ELBO per token of text for each K in `sizes`, eq. (7), and its three terms, eq. (8).

    `groups` holds the samples of each chunk, `chunk_lengths` the chunks' lengths in tokens. Chunks
    without a finite bound enter neither sum of the ratio; `elbo_failed_fraction_k<K>` is the
    fraction of groups of K samples whose bound is −∞ because all of their draws are invalid.
    """
    doc_ids, document_C = np.unique([group[0].doc_id for group in groups], return_inverse=True)
    log_w_CK = np.array([[sample.log_weight for sample in group] for group in groups])
    lengths_C = np.asarray(chunk_lengths, dtype=float)
    metrics: dict[str, float] = {}
    for size in sizes:
        bound_C, finite_fraction_C = chunk_bounds(log_w_CK, size)
        is_finite_C = finite_fraction_C > 0
        bound_D = np.bincount(document_C, np.where(is_finite_C, bound_C, 0.0), len(doc_ids))
        length_D = np.bincount(document_C, np.where(is_finite_C, lengths_C, 0.0), len(doc_ids))
        name = f"elbo_per_token_k{size}"
        metrics[name], metrics[f"{name}_se"] = ratio_estimate(bound_D, length_D)
        metrics[f"elbo_failed_fraction_k{size}"] = float(1 - finite_fraction_C.mean())
    name = f"elbo_per_token_k{max(sizes)}"
    metrics["elbo_per_token"], metrics["elbo_per_token_se"] = metrics[name], metrics[f"{name}_se"]
    return metrics | _elbo_terms(groups, document_C, len(doc_ids))


def chunk_bounds(log_w_CK: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The bound of eq. (6), IWAE_K with K = `size`, for each chunk.

    A chunk with more samples than K has several disjoint groups of K. Returns, both of shape (C,),
    the mean of the chunk's finite bounds in nats (0 where none is finite), and the fraction of its
    groups whose bound is finite.
    """
    used_samples = log_w_CK.shape[1] // size * size
    bound_CG = iwae_bound(log_w_CK[:, :used_samples].reshape(len(log_w_CK), -1, size))
    finite_CG = np.isfinite(bound_CG)
    mean_C = np.where(finite_CG, bound_CG, 0.0).sum(1) / np.maximum(finite_CG.sum(1), 1)
    return mean_C, finite_CG.mean(1)


def _elbo_terms(
    groups: Sequence[Sequence[Sample]], document_C: np.ndarray, num_documents: int
) -> dict[str, float]:
    """Eq. (8): utility E_q[log p(X | C, Z)], simplicity E_q[log p(Z | C)] and diversity
    E_q[−log q(Z | C, X)], in nats per chunk, over the valid draws."""
    valid = [[sample for sample in group if sample.finish == "stop"] for group in groups]
    has_latent_C = np.array([bool(group) for group in valid])
    documents = document_C[has_latent_C]
    count_D = np.bincount(documents, minlength=num_documents).astype(float)
    metrics: dict[str, float] = {}
    for name, column, sign in (
        ("utility", "log_p_text", 1),
        ("simplicity", "log_p_latent", 1),
        ("diversity", "log_q", -1),
    ):
        means = [sign * np.mean([getattr(s, column) for s in group]) for group in valid if group]
        sum_D = np.bincount(documents, means, num_documents)
        metrics[name], metrics[f"{name}_se"] = ratio_estimate(sum_D, count_D)
    return metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentScore:
    """A held-out document: its length in tokens, and −log p of its raw text after BOS in nats."""

    schema: ClassVar[pa.Schema] = pa.schema(
        {"doc_id": pa.string(), "tokens": pa.int64(), "nll": pa.float64()}
    )
    doc_id: str
    tokens: int
    nll: float


def nll_metrics(scores: Sequence[DocumentScore]) -> dict[str, float]:
    """Eq. (10): −log p of the raw documents per token, pooled. EOS does not belong to a text."""
    nll_D = np.array([score.nll for score in scores])
    tokens_D = np.array([score.tokens for score in scores], dtype=float)
    ratio, error = ratio_estimate(nll_D, tokens_D)
    return {"nll_per_token": ratio, "nll_per_token_se": error}


def score_documents(
    model: PreTrainedModel,
    special_tokens: SpecialTokens,
    documents: Mapping[str, Sequence[int]],
    context_length: int,
    batch_tokens: int,
) -> list[DocumentScore]:
    """−log p of each document's raw text, the numerator of eq. (10), by document id.

    A document that does not fit into the context window of `context_length` tokens is scored in
    consecutive windows, each of which is conditioned on the token before it.
    """
    prefixes: list[list[int]] = []
    branches: list[list[Sequence[int]]] = []
    document_indices: list[int] = []
    for index, tokens in enumerate(documents.values()):
        for start in range(0, len(tokens), context_length - 1):
            prefixes.append([tokens[start - 1] if start else special_tokens.bos])
            branches.append([tokens[start : start + context_length - 1]])
            document_indices.append(index)
    log_probs = token_log_probs(model, prefixes, branches, batch_tokens)
    nll_D = np.bincount(
        document_indices, [-window[0].sum() for window in log_probs], len(documents)
    )
    return [
        DocumentScore(doc_id=doc_id, tokens=len(tokens), nll=float(nll))
        for (doc_id, tokens), nll in zip(documents.items(), nll_D, strict=True)
    ]


def join_chunks(chunks: Sequence[Chunk]) -> dict[str, list[int]]:
    """The token ids of each document, by its id: its chunks concatenated in reading order."""
    documents: dict[str, list[int]] = {}
    for chunk in chunks:
        documents.setdefault(chunk.doc_id, []).extend(chunk.tokens)
    return documents
