"""Likelihood measures of a model on held-out text (docs/method.md, section 5).

Letters as in docs/method.md: X chunk, C context, Z latent, q proposal, p model, w weight, K samples
per chunk. Everything is in nats and pooled; standard errors are cluster-robust.

Shapes: C chunks of a corpus, D documents, K samples of a chunk, G groups of samples of a chunk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel

from boltlm.estep.config import DrawSettings
from boltlm.estep.contexts import ChunkInContext, chunks_in_context
from boltlm.estep.importance import iwae_bound
from boltlm.estep.scoring import token_log_probs
from boltlm.estep.shard_worker import context_token_budget
from boltlm.evaluation.clustered_errors import RatioEstimate, mean_estimate, ratio_estimate
from boltlm.records import Chunk, Document, Sample
from boltlm.sequences import layouts
from boltlm.tokens import SpecialTokens, TextCoder

# The terms of the bound for K = 1, eq. (8): the column of the samples that each is the mean of, and
# its sign.
_BOUND_TERMS = (
    ("utility", "log_p_text", 1),
    ("simplicity", "log_p_latent", 1),
    ("diversity", "log_q", -1),
)


def elbo_metrics(
    groups: Sequence[Sequence[Sample]],
    chunk_lengths: Sequence[int],
    sizes: Sequence[int],
    clusters: Mapping[str, str],
) -> dict[str, float]:
    """ELBO per token of text for each K in `sizes`, eq. (7), and its three terms, eq. (8), per
    chunk and per document; `elbo_k1_per_document` is their sum per document.

    `groups` holds the samples of each chunk, `chunk_lengths` the chunks' lengths in tokens,
    `clusters` the cluster of each document.
    """
    log_w_CK = np.array([[sample.log_weight for sample in group] for group in groups])
    lengths_C = np.asarray(chunk_lengths, dtype=float)
    cluster_C = [clusters[group[0].doc_id] for group in groups]
    metrics: dict[str, float] = {}
    for size in sizes:
        bound_C = chunk_bounds(log_w_CK, size)
        estimate = ratio_estimate(bound_C, lengths_C, cluster_C)
        metrics |= _with_error(f"elbo_per_token_k{size}", estimate)
        if size == max(sizes):
            metrics |= _with_error("elbo_per_token", estimate)
    document_C = [group[0].doc_id for group in groups]
    total_C = np.zeros(len(groups))
    for name, column, sign in _BOUND_TERMS:
        mean_C = np.array([sign * np.mean([getattr(s, column) for s in group]) for group in groups])
        metrics |= _with_error(name, mean_estimate(mean_C, cluster_C))
        metrics |= _per_document(name, mean_C, document_C, clusters)
        total_C += mean_C
    return metrics | _per_document("elbo_k1", total_C, document_C, clusters)


def _per_document(
    name: str, values_C: np.ndarray, document_C: Sequence[str], clusters: Mapping[str, str]
) -> dict[str, float]:
    """The mean over documents of the sum of `values_C` over the chunks of each, with its error."""
    doc_ids, document_index_C = np.unique(np.asarray(document_C), return_inverse=True)
    sums_D = np.bincount(document_index_C, values_C)
    estimate = mean_estimate(sums_D, [clusters[doc_id] for doc_id in doc_ids.tolist()])
    return _with_error(f"{name}_per_document", estimate)


def chunk_bounds(log_w_CK: np.ndarray, size: int) -> np.ndarray:
    """The bound of eq. (6), IWAE_K with K = `size`, for each chunk, shape (C,), in nats. A chunk
    with more samples than K has several disjoint groups of K, whose mean it gets."""
    used_samples = log_w_CK.shape[1] // size * size
    return iwae_bound(log_w_CK[:, :used_samples].reshape(len(log_w_CK), -1, size)).mean(1)


def _with_error(name: str, estimate: RatioEstimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_se": estimate.standard_error}


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentScore:
    """A held-out document: its cluster, its length in tokens, and two negative log-likelihoods in
    nats: `nll` of the raw text after BOS, eq. (10), and `nll_in_context`, the sum over its chunks
    of −log p(X | C) without a latent, eq. (13). `log_prob` as in `Document`."""

    schema: ClassVar[pa.Schema] = pa.schema(
        {
            "doc_id": pa.string(),
            "cluster": pa.string(),
            "tokens": pa.int64(),
            "nll": pa.float64(),
            "nll_in_context": pa.float64(),
            "log_prob": pa.float64(),
        }
    )
    doc_id: str
    cluster: str
    tokens: int
    nll: float
    nll_in_context: float
    log_prob: float | None


def nll_metrics(scores: Sequence[DocumentScore]) -> dict[str, float]:
    """Eqs. (10) and (13), pooled, and what they were measured on; `ceiling_per_token`, the mean of
    log p under the distribution that all documents were drawn from, where that is known: no model's
    log-likelihood exceeds it in expectation."""
    tokens_D = np.array([score.tokens for score in scores], dtype=float)
    cluster_D = [score.cluster for score in scores]
    metrics: dict[str, float] = {}
    for column in ("nll", "nll_in_context"):
        nll_D = np.array([getattr(score, column) for score in scores])
        metrics |= _with_error(f"{column}_per_token", ratio_estimate(nll_D, tokens_D, cluster_D))
    log_probs = [score.log_prob for score in scores if score.log_prob is not None]
    if len(log_probs) == len(scores):
        metrics["ceiling_per_token"] = sum(log_probs) / float(tokens_D.sum())
    counts = {"documents": len(scores), "tokens": int(tokens_D.sum())}
    counts["clusters"] = len(set(cluster_D))
    return metrics | {f"heldout_{name}": count for name, count in counts.items()}


def score_documents(
    model: PreTrainedModel,
    coder: TextCoder,
    settings: DrawSettings,
    documents: Sequence[Document],
    chunks: Sequence[Chunk],
    *,
    has_latents: bool,
) -> list[DocumentScore]:
    """The scores of documents, of which `chunks` are the chunks in the same order. `has_latents`:
    see `chunk_nlls`."""
    special, batch_tokens = coder.special_tokens, settings.sampling.batch_tokens
    texts = join_chunks(chunks)
    token_budget = context_token_budget(coder, settings.max_latent_tokens)
    with_context = chunks_in_context(chunks, settings.context_chunks, token_budget)
    nlls = document_nlls(model, special, texts, coder.context_length, batch_tokens)
    in_context = chunk_nlls(model, special, with_context, has_latents, batch_tokens)
    return [
        DocumentScore(
            doc_id=document.doc_id,
            cluster=document.cluster or document.doc_id,
            tokens=len(texts[document.doc_id]),
            nll=nlls[document.doc_id],
            nll_in_context=in_context[document.doc_id],
            log_prob=document.log_prob,
        )
        for document in documents
    ]


def document_nlls(
    model: PreTrainedModel,
    special_tokens: SpecialTokens,
    documents: Mapping[str, Sequence[int]],
    context_length: int,
    batch_tokens: int,
) -> dict[str, float]:
    """−log p of each document's raw text, the numerator of eq. (10), by document id. EOS does not
    belong to a text.

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
    return dict(zip(documents, nll_D.tolist(), strict=True))


def chunk_nlls(
    model: PreTrainedModel,
    special_tokens: SpecialTokens,
    chunks: Sequence[ChunkInContext],
    has_latents: bool,
    batch_tokens: int,
) -> dict[str, float]:
    """−log p(X | C) without a latent, eq. (13), summed over the chunks of each document, by its id:
    after the empty pair of latent marks where the model was trained with it (`has_latents`)."""
    prefixes = [
        layouts.no_latent_prompt(special_tokens, chunk.context)
        if has_latents
        else [special_tokens.bos, *chunk.context]
        for chunk in chunks
    ]
    log_probs = token_log_probs(model, prefixes, [[chunk.text] for chunk in chunks], batch_tokens)
    nlls = dict.fromkeys((chunk.doc_id for chunk in chunks), 0.0)
    for chunk, (log_probs_L,) in zip(chunks, log_probs, strict=True):
        nlls[chunk.doc_id] -= float(log_probs_L.sum())
    return nlls


def join_chunks(chunks: Sequence[Chunk]) -> dict[str, list[int]]:
    """The token ids of each document, by its id: its chunks concatenated in reading order."""
    documents: dict[str, list[int]] = {}
    for chunk in chunks:
        documents.setdefault(chunk.doc_id, []).extend(chunk.tokens)
    return documents
