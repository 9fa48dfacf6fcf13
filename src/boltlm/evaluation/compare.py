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
from boltlm.evaluation.downstream import TaskAnswer
from boltlm.evaluation.likelihood import DocumentScore, chunk_bounds, ratio_estimate
from boltlm.evaluation.run import ANSWER_TABLE, LATENT_TABLE, RAW_TABLE
from boltlm.records import Chunk, Record, Sample, read_table

_ChunkKey = tuple[str, int]
_AnswerKey = tuple[str, str, int]  # metric prefix, question, sample
_K = TypeVar("_K")
_R = TypeVar("_R", bound=Record)


class PairedDifference(NamedTuple):
    """A difference of two models, its standard error, and the number of pairs behind it."""

    value: float
    standard_error: float
    pairs: int


def paired_differences(one: Path, other: Path, chunks: Path) -> dict[str, PairedDifference]:
    """The metrics of the model `one` minus those of `other`, by their names in metrics/eval.

    `one` and `other` are the models' output folders, `chunks` the folder of a held-out corpus.
    nll_per_token is compared over the documents that both models scored; elbo_per_token, for every
    power of two up to the number of samples that both have, over the chunks for which both have a
    finite bound; accuracies over the questions that both answered. Raises UserError where the
    models have nothing in common.
    """
    corpus = chunks.name
    differences = {"nll_per_token": _nll_difference(one, other, corpus)}
    if all((folder / LATENT_TABLE / corpus).is_dir() for folder in (one, other)):
        differences |= _elbo_differences(one, other, chunks)
    return differences | _accuracy_differences(one, other)


def _read_output(folder: Path, table: str, kind: type[_R]) -> list[_R]:
    if not (folder / table).is_dir():
        raise UserError(
            f"{folder}: it has no table '{table}'; add the corpus to evaluate.corpus or"
            f" evaluate.extra_corpora and run dvc repro evaluate@{folder.name}"
        )
    return list(read_table(folder / table, kind))


def _nll_difference(one: Path, other: Path, corpus: str) -> PairedDifference:
    table = f"{RAW_TABLE}/{corpus}"
    scores, other_scores = (
        {row.doc_id: row for row in _read_output(folder, table, DocumentScore)}
        for folder in (one, other)
    )
    doc_ids = _common_keys(scores, other_scores, kind="documents")
    for doc_id in doc_ids:
        if scores[doc_id].tokens != other_scores[doc_id].tokens:
            raise UserError(
                f"{one} and {other}: document '{doc_id}' has {scores[doc_id].tokens} and"
                f" {other_scores[doc_id].tokens} tokens; models with different tokenizers cannot"
                " be compared per token"
            )
    nll_D = np.array([scores[doc_id].nll - other_scores[doc_id].nll for doc_id in doc_ids])
    tokens_D = np.array([scores[doc_id].tokens for doc_id in doc_ids], dtype=float)
    return PairedDifference(*ratio_estimate(nll_D, tokens_D), len(doc_ids))


def _elbo_differences(one: Path, other: Path, chunks: Path) -> dict[str, PairedDifference]:
    """Differences of eq. (7), with the standard error of eq. (9) over documents: the chunks of a
    document are not independent."""
    lengths = {
        (chunk.doc_id, chunk.chunk): len(chunk.tokens) for chunk in read_table(chunks, Chunk)
    }
    weights, other_weights = (_log_weights(folder, chunks.name) for folder in (one, other))
    keys = _common_keys(weights, other_weights, lengths, kind="chunks")
    num_samples = min(len(table[key]) for table in (weights, other_weights) for key in keys)
    log_w_CK, other_log_w_CK = (
        np.array([table[key][:num_samples] for key in keys]) for table in (weights, other_weights)
    )
    doc_ids, document_C = np.unique([doc_id for doc_id, _ in keys], return_inverse=True)
    length_C = np.array([lengths[key] for key in keys], dtype=float)
    differences: dict[str, PairedDifference] = {}
    for size in (2**power for power in range(num_samples.bit_length())):
        bound_C, finite_fraction_C = chunk_bounds(log_w_CK, size)
        other_bound_C, other_finite_fraction_C = chunk_bounds(other_log_w_CK, size)
        has_both_C = (finite_fraction_C > 0) & (other_finite_fraction_C > 0)
        difference_C = np.where(has_both_C, bound_C - other_bound_C, 0.0)
        difference_D = np.bincount(document_C, difference_C, len(doc_ids))
        length_D = np.bincount(document_C, np.where(has_both_C, length_C, 0.0), len(doc_ids))
        differences[f"elbo_per_token_k{size}"] = PairedDifference(
            *ratio_estimate(difference_D, length_D), int(has_both_C.sum())
        )
    return differences


def _log_weights(folder: Path, corpus: str) -> dict[_ChunkKey, list[float]]:
    """log w of the samples of each chunk."""
    weights: dict[_ChunkKey, list[float]] = {}
    for sample in _read_output(folder, f"{LATENT_TABLE}/{corpus}", Sample):
        weights.setdefault((sample.doc_id, sample.chunk), []).append(sample.log_weight)
    return weights


def _read_answers(folder: Path) -> dict[_AnswerKey, TaskAnswer]:
    if not (folder / ANSWER_TABLE).is_dir():  # evaluated on no task
        return {}
    answers = read_table(folder / ANSWER_TABLE, TaskAnswer)
    return {(row.metric_prefix, row.question_id, row.sample): row for row in answers}


def _accuracy_differences(one: Path, other: Path) -> dict[str, PairedDifference]:
    """Differences of accuracies, with standard errors over questions."""
    answers, other_answers = _read_answers(one), _read_answers(other)
    differences: dict[str, PairedDifference] = {}
    for prefix in dict.fromkeys(prefix for prefix, _, _ in answers):
        by_question: dict[str, list[float]] = {}
        for key in answers:
            if key[0] == prefix and key in other_answers:
                difference = float(answers[key].correct) - other_answers[key].correct
                by_question.setdefault(key[1], []).append(difference)
        means = np.array([np.mean(samples) for samples in by_question.values()])
        if len(means) > 1:
            error = float(means.std(ddof=1) / np.sqrt(len(means)))
            differences[f"{prefix}/accuracy"] = PairedDifference(
                float(means.mean()), error, len(means)
            )
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
    lines = [f"{one.name} − {other.name}"]
    for name, difference in differences.items():
        lines.append(
            f"{name:<34} {difference.value:+.4f} ± {difference.standard_error:.4f}"
            f"  ({difference.pairs} pairs)"
        )
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
