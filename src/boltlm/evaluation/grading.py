r"""Grading: an answer is extracted from what a model wrote, and compared with the gold answer.

The graders of the public tasks are those of lm-eval 0.4: the two filters of gsm8k_cot, the
`math_verify` metric of minerva_math, and the filter of mmlu_flan_cot_fewshot. The verdicts agree
with lm-eval's, apart from these intended differences:

- gsm8k: numbers are compared as numbers, so 18.00 and 18... equal 18. A Unicode minus sign is read
  as a minus sign; lm-eval skips it and thus takes −5 for 5.
- mmlu_stem: text after the letter does not matter ("(B) because 2 > 1."). lm-eval requires the
  letter to be alone on the line, and removes the last character of the line without looking at it:
  a bare "B" at the end of the text is wrong there, and "Be" is read as B.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache

from math_verify import parse, verify

# Commas group thousands.
_NUMBER = r"[-−]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
# As in lm-eval, where the last full stop of `strict` also matches any character.
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_STRICT = re.compile(r"The answer is (-?[0-9.,]+).")
_ANSWER_IS = re.compile(r"answer is (.+)")
# A letter in brackets, or at the end of its line or sentence; the "a" of "a prime" is not one.
_LETTER = re.compile(r"[\W_]*([A-Da-d])(?=\s*[)\]]|[\W_]*$|\W*[.;:]\s)")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer that a grader extracted, None where it found none, and whether it is correct."""

    extracted: str | None
    correct: bool


def grade(task: str, answer: str | None, gold: str) -> dict[str, Verdict]:
    r"""The verdict of each of the task's graders, by name.

    `answer` is the text that the model wrote as its answer; None and the empty text are never
    correct. `gold` is GSM8K's complete `answer`, MATH's complete `solution`, MMLU's letter, or the
    sentence that answers one of the corpus's own questions.

    To be called in the main thread: math_verify limits its time by SIGALRM (5 s for each of its
    steps), raises ValueError in any other thread, and cancels an alarm that was set before.
    """
    return {
        name: grader(answer, gold) if answer else Verdict(None, False)
        for name, grader in _GRADERS[task].items()
    }


def find_statement(text: str, gold: str) -> re.Match[str] | None:
    """The first sentence of the form of `gold` in `text`; its group 1 is the number. `gold` is
    "<stem> <number>.", such as "It stops at 4."; a digit after the full stop is part of the number.
    """
    stem = re.escape(gold.rpartition(" ")[0])
    return re.search(rf"{stem} ({_NUMBER})\.(?!\d)", text)


def same_number(number: str | None, gold: str) -> bool:
    """Whether two numerals denote the same number; commas and trailing zeros do not matter."""
    if number is None:
        return False
    try:
        return _decimal(number) == _decimal(gold)
    except InvalidOperation:
        return number == gold


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("−", "-"))


def _grade_question(answer: str, gold: str) -> Verdict:
    """The answer must begin with the statement; whatever follows it does not matter."""
    statement, expected = find_statement(answer, gold), find_statement(gold, gold)
    if statement is None or answer[: statement.start()].strip() or expected is None:
        return Verdict(None, False)
    return Verdict(statement[1], same_number(statement[1], expected[1]))


def _grade_gsm8k_flexible(answer: str, gold: str) -> Verdict:
    return _gsm8k_verdict(_FLEXIBLE.findall(answer.replace("−", "-"))[-1:], gold)


def _grade_gsm8k_strict(answer: str, gold: str) -> Verdict:
    return _gsm8k_verdict(_STRICT.findall(answer.replace("−", "-"))[:1], gold)


def _gsm8k_verdict(matches: list[str], gold: str) -> Verdict:
    number = matches[0].replace("$", "").rstrip(".,") if matches else ""
    return Verdict(number or None, same_number(number or None, gold.rpartition("####")[2].strip()))


# Cached because each answer is graded twice, by lm-eval and for the table of answers, and one
# grading may take seconds.
@lru_cache(maxsize=1 << 14)
def _grade_math(answer: str, gold: str) -> Verdict:
    # Neither call raises: after an error or a timeout `parse` returns nothing and `verify` False.
    # `parse` returns the parsed expression, which may be too large to be printed, and the LaTeX.
    target = parse(answer)
    latex = next((part for part in target if isinstance(part, str)), None)
    return Verdict(latex, verify(gold=parse(gold), target=target))


def _grade_letter(answer: str, gold: str) -> Verdict:
    line = _ANSWER_IS.search(answer)
    match = _LETTER.match(line[1]) if line else None
    letter = match[1].upper() if match else None
    return Verdict(letter, letter == gold)


_GRADERS: Mapping[str, Mapping[str, Callable[[str, str], Verdict]]] = {
    "gsm8k": {"flexible": _grade_gsm8k_flexible, "strict": _grade_gsm8k_strict},
    "math": {"math_verify": _grade_math},
    "mmlu_stem": {"letter": _grade_letter},
    "questions": {"number": _grade_question},
}
# The graders of each task; the fraction of answers that the first one accepts is called accuracy.
GRADERS: Mapping[str, tuple[str, ...]] = {
    task: tuple(graders) for task, graders in _GRADERS.items()
}
