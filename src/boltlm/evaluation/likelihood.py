"""Likelihood measures (SPEC section 5): pooled over documents, in nats, with standard errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel

from boltlm.records import Chunk, Sample
from boltlm.sampling.scoring import token_log_probs
from boltlm.sampling.weights import iwae
from boltlm.tokens import Markers


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """Σ above / Σ below over documents, and its standard error by the delta method; NaN where
    there is nothing to divide by."""
    if below.sum() == 0:
        return float("nan"), float("nan")
    value = above.sum() / below.sum()
    count = len(above)
    if count < 2:
        return float(value), float("nan")
    rest = above - value * below
    return float(value), float(np.sqrt(count / (count - 1) * (rest**2).sum()) / below.sum())


def bounds(
    groups: Sequence[Sequence[Sample]], raw_tokens: Sequence[int], sizes: Sequence[int]
) -> dict[str, float]:
    """ELBO per raw token for each K in `sizes`, and its parts per chunk.

    `groups` are the K draws of each chunk, `raw_tokens` the lengths of the chunks. The bound for
    a smaller K is the mean over the disjoint groups of K draws. Groups in which every draw
    failed have a bound of −∞: they are left out, and their share is reported beside the bound.
    """
    documents, place = np.unique([group[0].doc_id for group in groups], return_inverse=True)
    log_w_CK = np.array([[sample.log_weight for sample in group] for group in groups])
    lengths_C = np.asarray(raw_tokens, dtype=float)
    found: dict[str, float] = {}
    for size in sizes:
        bound_C, share_C = chunk_bounds(log_w_CK, size)
        known_C = share_C > 0
        above = np.bincount(place, np.where(known_C, bound_C, 0.0), len(documents))
        below = np.bincount(place, np.where(known_C, lengths_C, 0.0), len(documents))
        name = f"elbo_per_token_k{size}"
        found[name], found[f"{name}_se"] = ratio(above, below)
        found[f"elbo_failed_fraction_k{size}"] = float(1 - share_C.mean())
    largest = f"elbo_per_token_k{max(sizes)}"
    found["elbo_per_token"], found["elbo_per_token_se"] = found[largest], found[f"{largest}_se"]
    return found | _parts(groups, place, len(documents))


def chunk_bounds(log_w_CK: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each chunk the mean of its finite bounds over disjoint sets of `size` draws, nats, 0
    where none is finite; and the share of its sets whose bound is."""
    whole = log_w_CK.shape[1] // size * size
    bound_CG = iwae(log_w_CK[:, :whole].reshape(len(log_w_CK), -1, size))
    finite_CG = np.isfinite(bound_CG)
    mean_C = np.where(finite_CG, bound_CG, 0.0).sum(1) / np.maximum(finite_CG.sum(1), 1)
    return mean_C, finite_CG.mean(1)


def _parts(
    groups: Sequence[Sequence[Sample]], place: np.ndarray, documents: int
) -> dict[str, float]:
    """utility E[log p(X|Z)], simplicity E[log p(Z)], diversity E[−log q(Z)], nats a chunk, over
    the draws that are latents."""
    done = [[s for s in group if s.finish == "stop"] for group in groups]
    known = np.array([bool(group) for group in done])
    counts = np.bincount(place[known], minlength=documents).astype(float)
    found: dict[str, float] = {}
    for name, column, sign in (
        ("utility", "log_p_text", 1),
        ("simplicity", "log_p_latent", 1),
        ("diversity", "log_q", -1),
    ):
        means = [sign * np.mean([getattr(s, column) for s in group]) for group in done if group]
        sums = np.bincount(place[known], means, documents)
        found[name], found[f"{name}_se"] = ratio(sums, counts)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentScore:
    """A held-out document, its tokens, and −log p of its raw text after BOS, nats."""

    schema: ClassVar[pa.Schema] = pa.schema(
        {"doc_id": pa.string(), "tokens": pa.int64(), "nll": pa.float64()}
    )
    doc_id: str
    tokens: int
    nll: float


def raw_nll(scores: Sequence[DocumentScore]) -> dict[str, float]:
    """−log p of the raw documents per token of text (EOS is not text), pooled."""
    nats = np.array([score.nll for score in scores])
    tokens = np.array([score.tokens for score in scores], dtype=float)
    value, error = ratio(nats, tokens)
    return {"nll_per_token": value, "nll_per_token_se": error}


def raw_scores(
    model: PreTrainedModel,
    markers: Markers,
    documents: Mapping[str, Sequence[int]],
    window: int,
    batch_tokens: int,
) -> list[DocumentScore]:
    """Each document's raw likelihood. One beyond the window is scored in windows, each of which
    begins with the token before it."""
    prefixes: list[list[int]] = []
    branches: list[list[Sequence[int]]] = []
    owner: list[int] = []
    for index, tokens in enumerate(documents.values()):
        for start in range(0, len(tokens), window - 1):
            prefixes.append([tokens[start - 1] if start else markers.bos])
            branches.append([tokens[start : start + window - 1]])
            owner.append(index)
    logs = token_log_probs(model, prefixes, branches, batch_tokens)
    sums = np.bincount(owner, [-log[0].sum() for log in logs], len(documents))
    return [
        DocumentScore(doc_id=name, tokens=len(tokens), nll=float(nats))
        for (name, tokens), nats in zip(documents.items(), sums, strict=True)
    ]


def documents_of(chunks: Sequence[Chunk]) -> dict[str, list[int]]:
    """The raw token ids of each document by its id, its chunks joined."""
    found: dict[str, list[int]] = {}
    for chunk in chunks:
        found.setdefault(chunk.doc_id, []).extend(chunk.tokens)
    return found
