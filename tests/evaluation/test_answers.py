"""Answers: which number is read from a text, which numbers are the same, and from what prompt."""

from pathlib import Path

import pytest

from boltlm.evaluation import answers
from boltlm.evaluation.answers import Answer, accuracy, number, same_number
from boltlm.model import checkpoint
from boltlm.records import Question
from boltlm.sampling.estep import EStep
from boltlm.sequences import layouts
from boltlm.tokens import TextCoder
from tests import exact, tiny


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It stops at 7.", "7"),
        ("It stops at 7. It starts at 3.", "7"),
        (" It stops at 7", "7"),
        ("\n\n The answer is 12.\nSo 5.", "12"),
        ("From 3 by 4 it is 7.", "7"),
        ("The answer is 1,234,567.", "1,234,567"),
        ("It is 3.25. Then 9.", "3.25"),
        ("It is $18.", "18"),
        ("It is -4.", "-4"),
        ("About 20%.", "20"),
        ("It is 7!", "7"),
        ("5", "5"),
        ("See Fig. 3 for 8. Then 9.", "8"),
        ("No number here. But 9 here.", None),
        ("", None),
        ("   \n ", None),
        ("seven", None),
        ("7,", "7"),
        ("It is 1, 2, 3, and so on.", "3"),
        ("It is .5.", ".5"),
        ("It is −4.", "−4"),
        ("It is 10-3.", "3"),
    ],
)
def test_the_number_that_is_read(text: str, found: str | None) -> None:
    """The last number of the first sentence: what a model goes on to write is not its answer."""
    assert number(text) == found


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        ("7", "7", True),
        ("7.0", "7", True),
        ("7.50", "7.5", True),
        ("1,000", "1000", True),
        ("1000", "1,000", True),
        ("07", "7", True),
        ("-0", "0", True),
        ("-4", "4", False),
        ("7", "8", False),
        ("70", "7", False),
        ("0.1", "0.10000001", False),
        (None, "7", False),
        (None, "", False),
        ("7", "seven", False),
        ("seven", "seven", True),
        ("−4", "-4", True),
        (".5", "0.5", True),
        ("9007199254740993", "9007199254740992", False),
    ],
)
def test_the_same_number(found: str | None, wanted: str, same: bool) -> None:
    """Commas and trailing zeros are spelling; everything else is another number."""
    assert same_number(found, wanted) is same


def answered(correct: bool) -> Answer:
    return Answer(
        question_id="q", space="none", thought=None, completion="", extracted=None, answer="",
        correct=correct,
    )  # fmt: skip


def test_accuracy_by_hand() -> None:
    """Three of four, with the binomial standard error √(p (1 − p) / n)."""
    found = accuracy([answered(True)] * 3 + [answered(False)])
    assert found == pytest.approx((0.75, (0.75 * 0.25 / 4) ** 0.5))
    assert accuracy([answered(True)]) == (1.0, 0.0)


QUESTIONS = [
    Question(question_id="q0", prompt="Ann turns a dial", answer="7", latent=None),
    Question(question_id="q1", prompt=" from 3: it goes up by 4.", answer="3", latent=None),
]
THOUGHT, WRITTEN = 6, 5  # tokens at most


@pytest.fixture(scope="module")
def estep(base_folder: Path) -> EStep:
    return EStep(
        checkpoint.load(base_folder),
        TextCoder(base_folder),
        tiny.sampling_config(batch_tokens=1000),
        max_latent_tokens=THOUGHT,
        seed=1,
        purpose="tests",
    )


def greedy(estep: EStep, prompt: list[int], most: int) -> list[int]:
    """Most likely tokens until a special one or the limit."""
    slow, m = exact.double(estep.model), estep.markers
    special = {m.bos, m.eos, m.sol, m.eol, m.prior, m.post}
    found: list[int] = []
    while len(found) < most:
        best = int(exact.next_probs(slow, [*prompt, *found]).argmax())
        if best in special:
            break
        found.append(best)
    return found


@pytest.mark.parametrize("latent_format", [True, False])
@pytest.mark.parametrize("space", ["latent", "none"])
def test_answers_are_greedy_behind_the_right_prompt(
    estep: EStep, space: answers.Space, latent_format: bool
) -> None:
    """Latent: question, SoL Prior, thought, EoL. None: question, with the empty pair for models
    that were trained with it. A thought beyond the limit is closed there."""
    coder, m = estep.coder, estep.markers
    found = answers.answer(
        estep, QUESTIONS, space, latent_format=latent_format, room=50, answer_tokens=WRITTEN
    )
    for question, given in zip(QUESTIONS, found, strict=True):
        context, thought = coder.encode(question.prompt), None
        if space == "latent":
            before = layouts.prior_prefix(m, context)
            tokens = greedy(estep, before, THOUGHT)
            thought, prompt = coder.decode(tokens), [*before, *tokens, m.eol]
        else:
            prompt = [m.bos, *context, *([m.sol, m.eol] if latent_format else [])]
        completion = coder.decode(greedy(estep, prompt, WRITTEN))
        assert given == Answer(
            question_id=question.question_id,
            space=space,
            thought=thought,
            completion=completion,
            extracted=number(completion),
            answer=question.answer,
            correct=same_number(number(completion), question.answer),
        )


def test_a_long_question_keeps_its_end(estep: EStep) -> None:
    """What stands last is what is asked; the beginning goes, and only as much as must."""
    short = Question(question_id="q", prompt="b c d e", answer="1", latent=None)
    long = Question(question_id="q", prompt="a" * 50 + short.prompt, answer="1", latent=None)
    room = len(estep.coder.encode(short.prompt))
    found = [
        answers.answer(
            estep, [question], "none", latent_format=False, room=room, answer_tokens=WRITTEN
        )
        for question in (short, long)
    ]
    assert found[0] == found[1]


def test_no_room_for_a_question_is_no_question(estep: EStep) -> None:
    """[-0:] is everything: without room nothing of the prompt may be left, least of all all."""
    asked = Question(question_id="q", prompt="a" * 200, answer="1", latent=None)
    try:
        found = answers.answer(
            estep, [asked], "none", latent_format=False, room=0, answer_tokens=WRITTEN
        )
    except ValueError:
        return
    empty = greedy(estep, [estep.markers.bos], WRITTEN)
    assert found[0].completion == estep.coder.decode(empty)
