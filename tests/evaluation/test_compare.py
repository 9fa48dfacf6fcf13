"""Paired differences: their values, and errors that what is common to both models leaves alone."""

import math
from pathlib import Path

import numpy as np
import pytest

from boltlm.errors import UserError
from boltlm.evaluation import compare
from boltlm.evaluation.downstream import Answer
from boltlm.evaluation.likelihood import DocumentScore
from boltlm.records import Chunk, Sample, write_shard

DOCUMENTS, DRAWS = 200, 4


def chunks(folder: Path) -> Path:
    found = [
        Chunk(doc_id=f"d{d}", chunk=c, text="x", tokens=tuple(range(5 + d % 7 + c)))
        for d in range(DOCUMENTS)
        for c in range(2)
    ]
    write_shard(folder / "00000.parquet", Chunk, found)
    return folder


def model(folder: Path, shift: float, seed: int, *, lost: int = -1, right: float = 0.5) -> Path:
    """A model's tables: documents that are hard for all by far more than the models differ."""
    hard, own = np.random.default_rng(1), np.random.default_rng(seed)
    scores, samples = [], []
    for d in range(DOCUMENTS):
        difficulty = hard.normal(0, 30)
        tokens = sum(5 + d % 7 + c for c in range(2))
        nats = 100 + difficulty + shift * tokens + own.normal(0, 0.5)
        scores.append(DocumentScore(doc_id=f"d{d}", tokens=tokens, nll=nats))
        for c in range(2):
            for k in range(DRAWS):
                weight = -50 - difficulty - shift * (5 + d % 7 + c) + own.normal(0, 0.1)
                failed = d == lost and c == 0
                samples.append(
                    Sample(
                        doc_id=f"d{d}", chunk=c, sample=k, latent="", tokens=(),
                        finish="length" if failed else "stop", log_q=0.0, log_p_latent=0.0,
                        log_p_text=weight, log_weight=-math.inf if failed else weight,
                        selected=k == 0,
                    )
                )  # fmt: skip
    write_shard(folder / "raw" / "chunks" / "00000.parquet", DocumentScore, scores)
    write_shard(folder / "likelihood" / "chunks" / "00000.parquet", Sample, samples)
    answers = [
        Answer(
            task="questions", prompts="standard", space="latent", subject="", question_id=f"q{q}",
            sample=sample, shots=0, lost_shots=0, prompt="p", completion="t 7.", thought="t",
            gold="7", grader="number", extracted="7", correct=bool(q % 10 < 10 * right),
        )
        for q in range(100)
        for sample in range(2)
    ]  # fmt: skip
    write_shard(folder / "answers" / "00000.parquet", Answer, answers)
    return folder


def test_differences_are_paired(tmp_path: Path) -> None:
    """A shift of 0.05 nats a token is seen within its error, which is a hundredth of what the
    documents differ by; turned round, the signs turn."""
    one = model(tmp_path / "one", -0.05, 2, right=0.7)
    other = model(tmp_path / "other", 0.0, 3, right=0.5)
    heldout = chunks(tmp_path / "chunks")
    found = compare.differences(one, other, heldout)
    value, error, pairs = found["nll_per_token"]
    assert pairs == DOCUMENTS
    assert abs(value + 0.05) < 4 * error < 0.02
    for size in (1, 2, 4):
        value, error, pairs = found[f"elbo_per_token_k{size}"]
        assert pairs == 2 * DOCUMENTS
        assert abs(value - 0.05) < 4 * error < 0.01
    value, error, pairs = found["questions/standard/latent/accuracy"]
    assert (value, pairs) == (pytest.approx(0.2), 100)
    assert error == pytest.approx(math.sqrt(0.2 * 0.8 / 99))
    back = compare.differences(other, one, heldout)
    assert back == {
        name: (pytest.approx(-v), pytest.approx(e), n) for name, (v, e, n) in found.items()
    }


def test_a_model_differs_from_itself_by_nothing(tmp_path: Path) -> None:
    """Exactly nothing, with an error of nothing; and no question is in dispute."""
    one, heldout = model(tmp_path / "one", 0.0, 2), chunks(tmp_path / "chunks")
    found = compare.differences(one, one, heldout)
    assert all((value, error) == (0, 0) for value, error, _ in found.values())
    assert compare.disagreements(one, one) == []


def test_chunks_without_a_bound_leave_both(tmp_path: Path) -> None:
    """One chunk in which every draw of one model failed is no evidence for the other."""
    one, other = model(tmp_path / "one", 0.0, 2, lost=3), model(tmp_path / "other", 0.0, 3)
    found = compare.differences(one, other, chunks(tmp_path / "chunks"))
    value, _, pairs = found["elbo_per_token_k4"]
    assert pairs == 2 * DOCUMENTS - 1
    assert abs(value) < 0.01


def test_disagreements_show_both_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = model(tmp_path / "one", 0.0, 2, right=0.7)
    other = model(tmp_path / "other", 0.0, 3, right=0.5)
    found = compare.disagreements(one, other)
    assert len(found) == 40
    assert all(ours.correct and not theirs.correct for ours, theirs in found)
    arguments = [str(one), str(other), "--chunks", str(chunks(tmp_path / "chunks"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["compare", *arguments, "--disagreements", "2"])
        compare.main()
    told = capsys.readouterr().out
    assert "one − other" in told
    assert "40 answers with one verdict of two that is right" in told
    assert told.count("one, number, right: 7\n    t 7.") == 2
    assert told.count("other, number, wrong: 7\n    t 7.") == 2


def test_graders_are_compared_on_one_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with itself: answers on which two graders do not agree, and only those."""
    graded = [
        Answer(
            task="gsm8k", prompts="standard", space="raw", subject="", question_id=f"q{q}",
            sample=0,
            shots=8, lost_shots=0, prompt="p", completion="so 7", thought=None, gold="#### 7",
            grader=grader, extracted="7", correct=grader == "flexible" or q == 0,
        )
        for q in range(3)
        for grader in ("flexible", "strict")
    ]  # fmt: skip
    write_shard(tmp_path / "answers" / "00000.parquet", Answer, graded)
    found = compare.disagreements(tmp_path, tmp_path)
    assert [one.question_id for one, _ in found] == ["q1", "q2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["compare", str(tmp_path), str(tmp_path), "--disagreements", "9"])
        compare.main()
    told = capsys.readouterr().out
    assert "q1 (gsm8k/standard/raw)" in told
    assert told.count("strict, wrong") == 2


def test_what_cannot_be_compared_is_an_error(tmp_path: Path) -> None:
    """Not measured, other documents, another tokenizer: one line that says which."""
    one, heldout = model(tmp_path / "one", 0.0, 2), chunks(tmp_path / "chunks")
    with pytest.raises(UserError, match=r"none: no table 'raw/chunks'.*evaluate@none"):
        compare.differences(one, tmp_path / "none", heldout)
    apart = [DocumentScore(doc_id="z", tokens=3, nll=1.0)]
    write_shard(tmp_path / "two" / "raw" / "chunks" / "00000.parquet", DocumentScore, apart)
    with pytest.raises(UserError, match="no documents that both"):
        compare.differences(one, tmp_path / "two", heldout)
    other = [DocumentScore(doc_id="d0", tokens=3, nll=1.0)]
    write_shard(tmp_path / "two" / "raw" / "chunks" / "00000.parquet", DocumentScore, other)
    with pytest.raises(UserError, match="other tokenizers"):
        compare.differences(one, tmp_path / "two", heldout)
