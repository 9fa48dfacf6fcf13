"""Paired comparison: differences and standard errors in which what both models share cancels."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from boltlm.errors import UserError
from boltlm.evaluation import compare
from boltlm.evaluation.downstream import TaskAnswer
from boltlm.evaluation.likelihood import DocumentScore
from boltlm.records import Chunk, Sample, write_shard

NUM_DOCUMENTS, NUM_CHUNKS, NUM_SAMPLES = 200, 2, 4


def chunk_length(document: int, chunk: int) -> int:
    return 5 + document % 7 + chunk


def write_chunks(folder: Path) -> Path:
    chunks = [
        Chunk(doc_id=f"d{d}", chunk=c, text="x", tokens=tuple(range(chunk_length(d, c))))
        for d in range(NUM_DOCUMENTS)
        for c in range(NUM_CHUNKS)
    ]
    write_shard(folder / "00000.parquet", Chunk, chunks)
    return folder


def write_model(
    folder: Path, shift: float, seed: int, *, invalid: int = -1, accuracy: float = 0.5
) -> Path:
    """A model's output tables.

    `shift` is added to its negative log-likelihood per token. Documents differ by far more than the
    models do, and equally for all models; each model has noise of its own for every document, which
    the chunks of the document share, and for every sample. All samples of the first chunk of the
    document `invalid` are invalid.
    """
    shared, own = np.random.default_rng(1), np.random.default_rng(seed)
    scores, samples = [], []
    for d in range(NUM_DOCUMENTS):
        difficulty = shared.normal(0, 30)
        document_noise = own.normal(0, 0.15)
        lengths = [chunk_length(d, c) for c in range(NUM_CHUNKS)]
        nll = 100 + difficulty + shift * sum(lengths) + own.normal(0, 0.5)
        scores.append(DocumentScore(doc_id=f"d{d}", tokens=sum(lengths), nll=nll))
        for c, length in enumerate(lengths):
            for k in range(NUM_SAMPLES):
                log_weight = -50 - difficulty - shift * length + document_noise
                log_weight += own.normal(0, 0.1)
                is_invalid = d == invalid and c == 0
                samples.append(
                    Sample(
                        doc_id=f"d{d}", chunk=c, sample=k, latent="", tokens=(),
                        finish="length" if is_invalid else "stop", log_q=0.0, log_p_latent=0.0,
                        log_p_text=log_weight,
                        log_weight=-math.inf if is_invalid else log_weight, selected=k == 0,
                    )
                )  # fmt: skip
    write_shard(folder / "raw" / "chunks" / "00000.parquet", DocumentScore, scores)
    write_shard(folder / "likelihood" / "chunks" / "00000.parquet", Sample, samples)
    answers = [
        TaskAnswer(
            task="questions", prompts="standard", space="latent", subject="", question_id=f"q{q}",
            sample=sample, shots=0, lost_shots=0, prompt="p", completion="t 7.", thought="t",
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
    chunks = write_chunks(tmp_path / "chunks")
    differences = compare.paired_differences(one, other, chunks)
    value, error, pairs = differences["nll_per_token"]
    assert pairs == NUM_DOCUMENTS
    assert abs(value + 0.05) < 4 * error < 0.02
    for size in (1, 2, 4):
        value, error, pairs = differences[f"elbo_per_token_k{size}"]
        assert pairs == NUM_CHUNKS * NUM_DOCUMENTS
        assert abs(value - 0.05) < 4 * error < 0.01
    value, error, pairs = differences["questions/standard/latent/accuracy"]
    assert (value, pairs) == (pytest.approx(0.2), 100)
    assert error == pytest.approx(math.sqrt(0.2 * 0.8 / 99))
    exchanged = compare.paired_differences(other, one, chunks)
    assert exchanged == {
        name: (pytest.approx(-value), pytest.approx(error), pairs)
        for name, (value, error, pairs) in differences.items()
    }


def delta_error(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Eq. (9) of docs/method.md, written out."""
    n, ratio = len(numerators), sum(numerators) / sum(denominators)
    squares = [(a - ratio * b) ** 2 for a, b in zip(numerators, denominators, strict=True)]
    return math.sqrt(n / (n - 1) * sum(squares)) / sum(denominators)


def test_the_standard_error_of_the_bound_is_over_documents(tmp_path: Path) -> None:
    """The chunks of a document share its noise, so an error over chunks would be too small. It is
    computed by hand, and it agrees with a bootstrap over documents but not with one over chunks."""
    one = write_model(tmp_path / "one", -0.05, 2)
    other = write_model(tmp_path / "other", 0.0, 3)
    differences = compare.paired_differences(one, other, write_chunks(tmp_path / "chunks"))
    tables = [compare._log_weights(folder, "chunks") for folder in (one, other)]
    bounds = [
        {key: math.log(sum(map(math.exp, log_w)) / NUM_SAMPLES) for key, log_w in table.items()}
        for table in tables
    ]
    difference_DC = np.array(
        [
            [bounds[0][f"d{d}", c] - bounds[1][f"d{d}", c] for c in range(NUM_CHUNKS)]
            for d in range(NUM_DOCUMENTS)
        ]
    )
    length_DC = np.array(
        [[chunk_length(d, c) for c in range(NUM_CHUNKS)] for d in range(NUM_DOCUMENTS)]
    )
    value, error, _ = differences[f"elbo_per_token_k{NUM_SAMPLES}"]
    difference_D, length_D = difference_DC.sum(1), length_DC.sum(1)
    assert value == pytest.approx(difference_D.sum() / length_D.sum())
    assert error == pytest.approx(delta_error(difference_D.tolist(), length_D.tolist()))
    assert error > 1.25 * delta_error(difference_DC.ravel().tolist(), length_DC.ravel().tolist())
    picks = np.random.default_rng(5).integers(0, NUM_DOCUMENTS, size=(4000, NUM_DOCUMENTS))
    resampled = difference_D[picks].sum(1) / length_D[picks].sum(1)
    assert error == pytest.approx(resampled.std(ddof=1), rel=0.05)


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    """All differences and errors are exactly 0, and there are no disagreements."""
    one, chunks = write_model(tmp_path / "one", 0.0, 2), write_chunks(tmp_path / "chunks")
    differences = compare.paired_differences(one, one, chunks)
    assert all((value, error) == (0, 0) for value, error, _ in differences.values())
    assert compare.disagreements(one, one) == []


def test_chunks_without_a_bound_are_left_out_for_both_models(tmp_path: Path) -> None:
    """A chunk for which all samples of one model are invalid says nothing about the difference."""
    one = write_model(tmp_path / "one", 0.0, 2, invalid=3)
    other = write_model(tmp_path / "other", 0.0, 3)
    differences = compare.paired_differences(one, other, write_chunks(tmp_path / "chunks"))
    value, _, pairs = differences["elbo_per_token_k4"]
    assert pairs == NUM_CHUNKS * NUM_DOCUMENTS - 1
    assert abs(value) < 0.01


def test_the_comparison_as_text(tmp_path: Path) -> None:
    """A line for each metric, with its sign, error and number of pairs."""
    differences = {"nll_per_token": compare.PairedDifference(-0.05, 0.00123, 7)}
    text = compare.format_comparison(tmp_path / "one", tmp_path / "other", differences)
    header, line = text.splitlines()
    assert header == "one − other"
    assert line.split() == ["nll_per_token", "-0.0500", "±", "0.0012", "(7", "pairs)"]


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
            task="gsm8k", prompts="standard", space="raw", subject="", question_id=f"q{q}",
            sample=0,
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
    one, chunks = write_model(tmp_path / "one", 0.0, 2), write_chunks(tmp_path / "chunks")
    with pytest.raises(UserError, match=r"none: it has no table 'raw/chunks'.*evaluate@none"):
        compare.paired_differences(one, tmp_path / "none", chunks)
    scores_path = tmp_path / "two" / "raw" / "chunks" / "00000.parquet"
    write_shard(scores_path, DocumentScore, [DocumentScore(doc_id="z", tokens=3, nll=1.0)])
    with pytest.raises(UserError, match="no documents in common"):
        compare.paired_differences(one, tmp_path / "two", chunks)
    write_shard(scores_path, DocumentScore, [DocumentScore(doc_id="d0", tokens=3, nll=1.0)])
    with pytest.raises(UserError, match="different tokenizers"):
        compare.paired_differences(one, tmp_path / "two", chunks)
