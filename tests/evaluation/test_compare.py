"""Paired comparison: differences and standard errors in which what both models share cancels."""

import itertools
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boltlm.errors import UserError
from boltlm.evaluation import compare
from boltlm.evaluation.downstream import TaskAnswer
from boltlm.evaluation.likelihood import DocumentScore
from boltlm.records import Sample, read_table, write_shard

NUM_DOCUMENTS, NUM_CHUNKS, NUM_SAMPLES = 200, 2, 4


def chunk_length(document: int, chunk: int) -> int:
    return 5 + document % 7 + chunk


def write_model(
    folder: Path, shift: float, seed: int, *, accuracy: float = 0.5, latents: bool = True
) -> Path:
    """A model's output tables, without a table of latents where it writes none.

    `shift` is added to its negative log-likelihood per token. Documents differ by far more than the
    models do, and equally for all models; each model has noise of its own for every document, which
    the chunks of the document share, and for every sample. Two documents, and ten questions, are a
    cluster. Without a latent, the likelihood in context is 0.1 nats per token lower than the bound.
    """
    shared, own = np.random.default_rng(1), np.random.default_rng(seed)
    scores, samples = [], []
    for d in range(NUM_DOCUMENTS):
        difficulty = shared.normal(0, 30)
        document_noise = own.normal(0, 0.15)
        lengths = [chunk_length(d, c) for c in range(NUM_CHUNKS)]
        nll = 100 + difficulty + shift * sum(lengths) + own.normal(0, 0.5)
        bound = 0.0
        for c, length in enumerate(lengths):
            for k in range(NUM_SAMPLES):
                log_weight = -50 - difficulty - shift * length + document_noise
                log_weight += own.normal(0, 0.1)
                bound += log_weight / NUM_SAMPLES
                values: dict[str, Any] = dict.fromkeys(
                    (field.name for field in fields(Sample)), 0.0
                )
                values |= {"doc_id": f"d{d}", "chunk": c, "sample": k, "log_weight": log_weight}
                values |= {"latent": "", "tokens": (), "finish": "stop", "selected": k == 0}
                values |= {"source": "proposal", "ancestor": None}
                samples.append(Sample(**values))
        scores.append(
            DocumentScore(
                doc_id=f"d{d}", cluster=f"c{d // 2}", tokens=sum(lengths), nll=nll,
                nll_in_context=0.1 * sum(lengths) - bound, log_prob=None,
            )
        )  # fmt: skip
    write_shard(folder / "raw" / "held" / "00000.parquet", DocumentScore, scores)
    if latents:
        write_shard(folder / "likelihood" / "held" / "00000.parquet", Sample, samples)
    answers = [
        TaskAnswer(
            task="questions", prompts="standard", space="latent", subject="", level="",
            question_id=f"q{q}",
            cluster=f"c{q // 10}", cue=0, sample=sample, shots=0, lost_shots=0, prompt="p",
            completion="t 7.", thought="t",
            gold="7", grader="number", extracted="7", correct=bool(q % 10 < 10 * accuracy),
        )
        for q in range(100)
        for sample in range(2)
    ]  # fmt: skip
    write_shard(folder / "answers" / "00000.parquet", TaskAnswer, answers)
    return folder


def test_differences_are_paired(tmp_path: Path) -> None:
    """A shift of 0.05 nats per token is recovered within its standard error, which is a hundredth
    of the spread of the documents. Exchanging the models negates the differences."""
    one = write_model(tmp_path / "one", -0.05, 2, accuracy=0.7)
    other = write_model(tmp_path / "other", 0.0, 3, accuracy=0.5)
    differences = compare.paired_differences(one, other, "held")
    signs = {"nll_per_token": -1, "nll_in_context_per_token": -1}
    signs |= {f"elbo_per_token_k{size}": 1 for size in (1, 2, 4)}
    best = "best_bound_per_token [elbo_per_token_k4 − elbo_per_token_k4]"
    accuracy = "questions/standard/latent/accuracy"
    assert list(differences) == [*signs, best, accuracy]
    assert differences[best] == differences["elbo_per_token_k4"]
    for name, sign in signs.items():
        value, error, pairs, clusters = differences[name]
        assert (pairs, clusters) == (NUM_DOCUMENTS, NUM_DOCUMENTS // 2)
        assert abs(value - sign * 0.05) < 4 * error < 0.02
    exchanged = compare.paired_differences(other, one, "held")
    assert exchanged == {
        name: (pytest.approx(-value), pytest.approx(error), pairs, clusters)
        for name, (value, error, pairs, clusters) in differences.items()
    }


def test_accuracies_are_clustered(tmp_path: Path) -> None:
    """Of each ten questions of a cluster, two more are right: the clusters do not differ, so the
    difference of 0.2 has no error at all, while one over questions would be 0.04."""
    one = write_model(tmp_path / "one", 0.0, 2, accuracy=0.7)
    other = write_model(tmp_path / "other", 0.0, 3, accuracy=0.5)
    differences = compare.paired_differences(one, other, "held")
    value, error, pairs, clusters = differences["questions/standard/latent/accuracy"]
    assert (value, pairs, clusters) == (pytest.approx(0.2), 100, 10)
    assert error == pytest.approx(0, abs=1e-12)


def test_the_standard_error_of_the_bound_is_over_clusters(tmp_path: Path) -> None:
    """Eq. (9) of docs/method.md written out, with the sums of bounds and lengths over the chunks of
    a cluster's two documents; and it agrees with a bootstrap over clusters (4000 resamples of 100:
    within 5 %)."""
    one = write_model(tmp_path / "one", -0.05, 2)
    other = write_model(tmp_path / "other", 0.0, 3)
    difference_G = np.zeros(NUM_DOCUMENTS // 2)
    length_G = np.zeros(NUM_DOCUMENTS // 2)
    for folder, sign in ((one, 1), (other, -1)):
        groups = itertools.groupby(
            read_table(folder / "likelihood" / "held", Sample), lambda s: (s.doc_id, s.chunk)
        )
        for (doc_id, _), group in groups:
            bound = math.log(sum(math.exp(s.log_weight) for s in group) / NUM_SAMPLES)
            difference_G[int(doc_id[1:]) // 2] += sign * bound
    for d, c in np.ndindex(NUM_DOCUMENTS, NUM_CHUNKS):
        length_G[d // 2] += chunk_length(d, c)
    value, error, *_ = compare.paired_differences(one, other, "held")["elbo_per_token_k4"]
    ratio, count = difference_G.sum() / length_G.sum(), len(length_G)
    squares = ((difference_G - ratio * length_G) ** 2).sum()
    assert value == pytest.approx(ratio)
    assert error == pytest.approx(math.sqrt(count / (count - 1) * squares) / length_G.sum())
    picks = np.random.default_rng(5).integers(0, count, size=(4000, count))
    resampled = difference_G[picks].sum(1) / length_G[picks].sum(1)
    assert error == pytest.approx(resampled.std(ddof=1), rel=0.05)


def test_a_model_with_latents_and_one_without(tmp_path: Path) -> None:
    """The better of bound and likelihood in context, here the bound, is compared with the
    likelihood of the other model, over the same chunks in the same contexts."""
    one = write_model(tmp_path / "one", -0.05, 2)
    other = write_model(tmp_path / "other", 0.0, 3, latents=False)
    differences = compare.paired_differences(one, other, "held")
    best = "best_bound_per_token [elbo_per_token_k4 − nll_in_context]"
    assert not any(name.startswith("elbo") for name in differences)
    value, error, *_ = differences[best]
    assert abs(value - 0.15) < 4 * error + 0.01  # K = 4 gains a little over the mean of log w
    in_context = differences["nll_in_context_per_token"]
    assert value - 0.1 == pytest.approx(-in_context.value, abs=0.01)


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    """All differences and errors are exactly 0, and there are no disagreements."""
    one = write_model(tmp_path / "one", 0.0, 2)
    differences = compare.paired_differences(one, one, "held")
    assert all((value, error) == (0, 0) for value, error, *_ in differences.values())
    assert compare.disagreements(one, one) == []


def test_the_comparison_as_text(tmp_path: Path) -> None:
    """A line for each metric, with its sign, error and numbers of pairs and clusters."""
    differences = {"nll_per_token": compare.PairedDifference(-0.05, 0.00123, 7, 5)}
    text = compare.format_comparison(tmp_path / "one", tmp_path / "other", differences)
    header, line = text.splitlines()
    assert header == "one − other ± standard error"
    assert " ".join(line.split()) == "nll_per_token -0.0500 ± 0.0012 (7 pairs, 5 clusters)"


def test_disagreements_show_both_answers(tmp_path: Path) -> None:
    """Every question that exactly one model answers correctly, and the first two in full."""
    one = write_model(tmp_path / "one", 0.0, 2, accuracy=0.7)
    other = write_model(tmp_path / "other", 0.0, 3, accuracy=0.5)
    pairs = compare.disagreements(one, other)
    assert len(pairs) == 40
    assert all(answer.correct and not other_answer.correct for answer, other_answer in pairs)
    text = compare.format_disagreements(one, other, pairs, 2)
    assert "40 pairs of verdicts of which only one is correct" in text
    assert text.count("one, number, correct: 7\n    t 7.") == 2
    assert text.count("other, number, wrong: 7\n    t 7.") == 2


def test_graders_are_compared_on_one_model(tmp_path: Path) -> None:
    """Of a folder and itself: the answers about which two graders disagree, and no others."""
    answers = [
        TaskAnswer(
            task="gsm8k", prompts="standard", space="raw", subject="", level="",
            question_id=f"q{q}", cluster=f"q{q}", cue=0, sample=0,
            shots=8, lost_shots=0, prompt="p", completion="so 7", thought=None, gold="#### 7",
            grader=grader, extracted="7", correct=grader == "flexible" or q == 0,
        )
        for q in range(3)
        for grader in ("flexible", "strict")
    ]  # fmt: skip
    write_shard(tmp_path / "answers" / "00000.parquet", TaskAnswer, answers)
    pairs = compare.disagreements(tmp_path, tmp_path)
    assert [answer.question_id for answer, _ in pairs] == ["q1", "q2"]
    text = compare.format_disagreements(tmp_path, tmp_path, pairs, 9)
    assert "q1 (gsm8k/standard/raw)" in text
    assert text.count("strict, wrong") == 2


def test_models_without_anything_in_common(tmp_path: Path) -> None:
    """A missing table, other documents or another tokenizer is an error that names it."""
    one = write_model(tmp_path / "one", 0.0, 2)
    with pytest.raises(UserError, match=r"none: it has no table 'raw/held'.*evaluate@none"):
        compare.paired_differences(one, tmp_path / "none", "held")
    path = tmp_path / "two" / "raw" / "held" / "00000.parquet"
    for doc_id, message in (("z", "no documents in common"), ("d0", "different tokenizers")):
        values: dict[str, Any] = {"doc_id": doc_id, "cluster": "", "tokens": 3, "log_prob": None}
        score = DocumentScore(**values, nll=1.0, nll_in_context=1.0)
        write_shard(path, DocumentScore, [score])
        with pytest.raises(UserError, match=message):
            compare.paired_differences(one, tmp_path / "two", "held")
