"""Paired comparison of two models on the same documents and questions (docs/method.md, 6.4).

What makes a document or question hard for any model cancels in the differences, so their standard
errors are smaller than those of the two models' own metrics.

Shapes: C chunks of a corpus, D documents, K samples of a chunk.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from boltlm.errors import UserError
from boltlm.estep.shard_worker import group_by_chunk
from boltlm.evaluation.clustered_errors import mean_estimate, ratio_estimate
from boltlm.evaluation.downstream import TaskAnswer
from boltlm.evaluation.likelihood import DocumentScore, chunk_bounds
from boltlm.evaluation.run import ANSWER_TABLE, LATENT_TABLE, RAW_TABLE
from boltlm.records import Sample, read_table

_AnswerKey = tuple[str, str, int]  # metric prefix, question, sample
_K = TypeVar("_K")


class PairedDifference(NamedTuple):
    """A difference of two models, its standard error, and the numbers of pairs (documents or
    questions) and of clusters behind it."""

    value: float
    standard_error: float
    pairs: int
    clusters: int


def paired_differences(one: Path, other: Path, corpus: str) -> dict[str, PairedDifference]:
    """The metrics of the model `one` minus those of `other`, by their names in metrics/eval.

    `one` and `other` are the models' output folders, `corpus` is a held-out corpus. Likelihood
    measures are compared over the documents that both models scored, bounds for every power of two
    up to the number of samples that both have, accuracies over the questions that both answered.
    `best_bound_per_token` compares the higher of each model's bounds and likelihood in context,
    which the brackets name. Raises UserError where the models have nothing in common.
    """
    scores = [_read_scores(folder, corpus) for folder in (one, other)]
    doc_ids = _common_keys(*scores, kind="documents")
    rows = [scores[0][doc_id] for doc_id in doc_ids]
    for row in rows:
        if row.tokens != (tokens := scores[1][row.doc_id].tokens):
            raise UserError(
                f"{one} and {other}: document '{row.doc_id}' has {row.tokens} and {tokens} tokens;"
                " models with different tokenizers cannot be compared per token"
            )
    tokens_D = np.array([row.tokens for row in rows], dtype=float)
    cluster_D = [row.cluster for row in rows]

    def difference(one_D: np.ndarray, other_D: np.ndarray) -> PairedDifference:
        value, error, clusters = ratio_estimate(one_D - other_D, tokens_D, cluster_D)
        return PairedDifference(value, error, len(rows), clusters)

    log_weights = [_log_weights(folder, corpus) for folder in (one, other)]
    num_samples = min(
        (log_w_CK.shape[1] for table in log_weights for log_w_CK in table.values()), default=0
    )
    bounds = [_bounds(table, doc_ids, num_samples) for table in log_weights]
    differences: dict[str, PairedDifference] = {}
    for column in ("nll", "nll_in_context"):
        values = [np.array([getattr(table[d], column) for d in doc_ids]) for table in scores]
        differences[f"{column}_per_token"] = difference(*values)
    for name in (name for name in bounds[0] if name in bounds[1]):
        differences[name] = difference(bounds[0][name], bounds[1][name])
    for table, bound in zip(scores, bounds, strict=True):
        bound["nll_in_context"] = -np.array([table[d].nll_in_context for d in doc_ids])
    best = [max(bound, key=lambda name, bound=bound: bound[name].sum()) for bound in bounds]
    name = f"best_bound_per_token [{' − '.join(best)}]"
    differences[name] = difference(bounds[0][best[0]], bounds[1][best[1]])
    return differences | _accuracy_differences(one, other)


def _read_scores(folder: Path, corpus: str) -> dict[str, DocumentScore]:
    table = folder / RAW_TABLE / corpus
    if not table.is_dir():
        raise UserError(
            f"{folder}: it has no table '{RAW_TABLE}/{corpus}'; add the corpus to evaluate.corpus"
            f" or evaluate.extra_corpora and run dvc repro evaluate@{folder.name}"
        )
    return {row.doc_id: row for row in read_table(table, DocumentScore)}


def _log_weights(folder: Path, corpus: str) -> dict[str, np.ndarray]:
    """log w of the samples of each document's chunks, shape (C, K); empty for a model without
    latents."""
    weights: dict[str, list[list[float]]] = {}
    table = folder / LATENT_TABLE / corpus
    for group in group_by_chunk(read_table(table, Sample) if table.is_dir() else ()):
        weights.setdefault(group[0].doc_id, []).append([sample.log_weight for sample in group])
    return {doc_id: np.array(log_w_CK) for doc_id, log_w_CK in weights.items()}


def _bounds(
    log_weights: Mapping[str, np.ndarray], doc_ids: Sequence[str], num_samples: int
) -> dict[str, np.ndarray]:
    """The bound of each document, the sum over its chunks in nats, for every power of two up to
    `num_samples`; empty for a model without latents."""
    sizes = [2**power for power in range(num_samples.bit_length())] if log_weights else []
    return {
        f"elbo_per_token_k{size}": np.array(
            [chunk_bounds(log_weights[d][:, :num_samples], size).sum() for d in doc_ids]
        )
        for size in sizes
    }


def _read_answers(folder: Path) -> dict[_AnswerKey, TaskAnswer]:
    if not (folder / ANSWER_TABLE).is_dir():  # evaluated on no task
        return {}
    answers = read_table(folder / ANSWER_TABLE, TaskAnswer)
    return {(row.metric_prefix, row.question_id, row.sample): row for row in answers}


def _accuracy_differences(one: Path, other: Path) -> dict[str, PairedDifference]:
    """Differences of accuracies, means over questions."""
    answers, other_answers = _read_answers(one), _read_answers(other)
    differences: dict[str, PairedDifference] = {}
    for prefix in dict.fromkeys(prefix for prefix, _, _ in answers):
        by_question: dict[str, list[float]] = {}
        cluster_of: dict[str, str] = {}
        for key, answer in answers.items():
            if key[0] == prefix and key in other_answers:
                difference = float(answer.correct) - other_answers[key].correct
                by_question.setdefault(answer.question_id, []).append(difference)
                cluster_of[answer.question_id] = answer.cluster
        if by_question:
            means = np.array([np.mean(samples) for samples in by_question.values()])
            value, error, clusters = mean_estimate(means, list(cluster_of.values()))
            differences[f"{prefix}/accuracy"] = PairedDifference(value, error, len(means), clusters)
    return differences


def disagreements(one: Path, other: Path) -> list[tuple[TaskAnswer, TaskAnswer]]:
    """The pairs of answers to the same question, by the same grader, of which exactly one is
    correct. Of a folder and itself: the pairs of verdicts of two graders on the same answer."""
    if one == other:
        by_sample: dict[tuple[str, str, str, str, int], list[TaskAnswer]] = {}
        for row in _read_answers(one).values():
            key = (row.task, row.prompts, row.space, row.question_id, row.sample)
            by_sample.setdefault(key, []).append(row)
        pairs = [pair for rows in by_sample.values() for pair in combinations(rows, 2)]
    else:
        answers, other_answers = _read_answers(one), _read_answers(other)
        pairs = [(answers[key], other_answers[key]) for key in answers if key in other_answers]
    return [(first, second) for first, second in pairs if first.correct != second.correct]


def format_comparison(one: Path, other: Path, differences: Mapping[str, PairedDifference]) -> str:
    """The paired differences as text, one per line."""
    lines = [f"{one.name} − {other.name} ± standard error"]
    for name, (value, error, pairs, clusters) in differences.items():
        lines.append(f"{name:<40} {value:+.4f} ± {error:.4f}  ({pairs} pairs, {clusters} clusters)")
    return "\n".join(lines)


def format_disagreements(
    one: Path, other: Path, pairs: Sequence[tuple[TaskAnswer, TaskAnswer]], limit: int
) -> str:
    """The number of disagreements, and the first `limit` of them in full."""
    lines = [f"{len(pairs)} pairs of verdicts of which only one is correct"]
    for answer, other_answer in pairs[:limit]:
        lines += [
            f"{answer.question_id} ({answer.metric_prefix}), gold answer: {answer.gold}",
            _format_answer(one.name, answer),
            _format_answer(other.name, other_answer),
        ]
    return "\n".join(lines)


def _format_answer(model: str, answer: TaskAnswer) -> str:
    verdict = "correct" if answer.correct else "wrong"
    completion = answer.completion.strip().replace("\n", "\n    ")
    return f"  {model}, {answer.grader}, {verdict}: {answer.extracted}\n    {completion}"


def _common_keys(*tables: Mapping[_K, object], kind: str) -> list[_K]:
    keys = [key for key in tables[0] if all(key in table for table in tables)]
    if not keys:
        raise UserError(
            f"the two models have no {kind} in common; evaluate them on the same corpus"
        )
    return keys
