"""The page of `boltlm compare --html`."""

from pathlib import Path

import pytest

from boltlm.evaluation.compare import PairedDifference
from boltlm.evaluation.downstream import TaskAnswer
from boltlm.reporting.comparison_page import write_comparison
from tests.reporting.latents import HOSTILE


def answer(question: str, *, correct: bool, text: str = "so 7") -> TaskAnswer:
    return TaskAnswer(
        task="gsm8k", prompts="standard", space="raw", subject="", level="",
        question_id=question, cluster=question, cue=0, sample=0,
        shots=8, lost_shots=0, prompt=f"Q: {text}", completion=text, thought=None, gold=text,
        grader="number", extracted=text, correct=correct,
    )  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> str:
    differences = {
        "elbo_per_token": PairedDifference(-0.5, 0.01, 300, 100),
        "gsm8k/standard/raw/accuracy": PairedDifference(0.01, 0.5, 400, 400),
        f"{HOSTILE}/accuracy": PairedDifference(0.25, 0.0, 1, 1),
    }
    pairs = [
        (answer("q1", correct=True), answer("q1", correct=False)),
        (answer("q2", correct=False, text=HOSTILE), answer("q2", correct=True, text=HOSTILE)),
        (answer("q3", correct=False), answer("q3", correct=True)),
    ]
    out = tmp_path / "page.html"
    write_comparison(Path("data/em2"), Path("data/<b>em1"), differences, pairs, out)
    return out.read_text("utf-8")


def test_the_page_has_differences_and_the_questions_on_which_the_two_differ(page: str) -> None:
    """−0.5 ± 0.01 over 100 clusters: the 95 % interval is 1.984 standard errors to each side."""
    assert "−0.5000 ± 0.0100 *" in page
    assert "[−0.5198, −0.4802]" in page
    assert "+0.0100 ± 0.5000<" in page, "not significant"
    assert "+0.2500 ± 0.0000<" in page, "a single cluster has no interval"
    assert "Correct only by em2: 1" in page
    first, second = page.index("q1 ("), page.index("q3 (")
    assert page.index("Correct only by em2") < first < page.index(": 2</h3>") < second


def test_no_text_becomes_html(page: str) -> None:
    """The page has no script at all, and its policy forbids one."""
    assert HOSTILE not in page
    assert "<script" not in page
    assert "<img" not in page
    assert "default-src 'none'" in page
