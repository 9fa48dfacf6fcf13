r"""What a model wrote, read and judged: numbers, mathematics, letters.

The graders of the public tasks are lm-eval's (0.4): the two filters of gsm8k_cot, the `math_verify`
metric of minerva_math, the filter of mmlu_flan_cot_fewshot. The verdicts agree with lm-eval's, save
for these differences, which are wanted:

- gsm8k: numbers are compared as numbers, so 18.00 is 18, and 18... is 18; a Unicode minus is a
  minus (lm-eval skips it, and so takes −5 for 5).
- mmlu_stem: what follows the letter does not matter ("(B) because 2 > 1."). lm-eval wants the
  letter alone on the rest of the line, and drops that line's last character unseen: a bare "B" at
  the end of the text is wrong there, and "Be" is a B.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache

from math_verify import parse, verify

from boltlm.corpus.chunks import sentences

# A sign belongs to a number unless a digit stands before it; commas group thousands.
_NUMBER = re.compile(r"(?:(?<![\d.])[-−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
# lm-eval's: the last full stop of `strict` stands for any character, as it does there.
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_STRICT = re.compile(r"The answer is (-?[0-9.,]+).")
_ANSWER_IS = re.compile(r"answer is (.+)")
# A letter in brackets, or one that ends its line or its sentence: the "a" of "a prime" is none.
_LETTER = re.compile(r"[\W_]*([A-Da-d])(?=\s*[)\]]|[\W_]*$|\W*[.;:]\s)")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the grader read as the answer, None where it found none, and whether it is right."""

    extracted: str | None
    correct: bool


def grade(task: str, answer: str | None, gold: str) -> dict[str, Verdict]:
    r"""The verdict of each of the task's graders, by name.

    `answer` is what the model wrote as its answer; None or nothing is never correct. `gold` is
    GSM8K's whole `answer`, MATH's whole `solution`, MMLU's letter, or a question's number.

    Call it in the main thread: math_verify limits its time by SIGALRM (5 s for each of its steps),
    raises `ValueError` in another thread, and ends any alarm that was set before.
    """
    return {
        name: read(answer, gold) if answer else Verdict(None, False)
        for name, read in _GRADERS[task].items()
    }


def number(text: str) -> str | None:
    """The last number of the first sentence of `text`, or None."""
    first = next(iter(sentences(text.strip())), "")
    found = _NUMBER.findall(first)
    return found[-1] if found else None


def same_number(found: str | None, wanted: str) -> bool:
    """Whether both say the same number, thousands commas and trailing zeros aside."""
    if found is None:
        return False
    try:
        return _decimal(found) == _decimal(wanted)
    except InvalidOperation:
        return found == wanted


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("−", "-"))


def _question(answer: str, gold: str) -> Verdict:
    found = number(answer)
    return Verdict(found, same_number(found, gold))


def _flexible(answer: str, gold: str) -> Verdict:
    return _gsm8k(_FLEXIBLE.findall(answer.replace("−", "-"))[-1:], gold)


def _strict(answer: str, gold: str) -> Verdict:
    return _gsm8k(_STRICT.findall(answer.replace("−", "-"))[:1], gold)


def _gsm8k(found: list[str], gold: str) -> Verdict:
    read = found[0].replace("$", "").rstrip(".,") if found else ""
    return Verdict(read or None, same_number(read, gold.rpartition("####")[2].strip()))


@lru_cache(maxsize=1 << 14)  # lm-eval asks, and then the table of answers: seconds, at worst
def _math(answer: str, gold: str) -> Verdict:
    # Neither call raises: what fails or takes too long in them finds nothing or is not equal.
    # `parse` gives what it understood, which may be too large to be written out, and the LaTeX.
    target = parse(answer)
    latex = next((one for one in target if isinstance(one, str)), None)
    return Verdict(latex, verify(gold=parse(gold), target=target))


def _letter(answer: str, gold: str) -> Verdict:
    line = _ANSWER_IS.search(answer)
    found = _LETTER.match(line[1]) if line else None
    letter = found[1].upper() if found else None
    return Verdict(letter, letter == gold)


_GRADERS: Mapping[str, Mapping[str, Callable[[str, str], Verdict]]] = {
    "gsm8k": {"flexible": _flexible, "strict": _strict},
    "math": {"math_verify": _math},
    "mmlu_stem": {"letter": _letter},
    "questions": {"number": _question},
}
# Of each task; the share of the first one is called accuracy.
GRADERS: Mapping[str, tuple[str, ...]] = {task: tuple(named) for task, named in _GRADERS.items()}
