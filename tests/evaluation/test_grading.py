"""Grading: the extracted answer, the verdict, and whether lm-eval gives the same one."""

import importlib.metadata
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.metrics import exact_match_fn
from lm_eval.filters.extraction import RegexFilter

from boltlm.evaluation.grading import GRADERS, Verdict, grade, same_number

TASKS = Path(lm_eval.__file__).parent / "tasks"
GSM8K = yaml.safe_load((TASKS / "gsm8k/gsm8k-cot.yaml").read_text())
MMLU = yaml.safe_load(
    (TASKS / "mmlu/flan_cot_fewshot/_mmlu_flan_cot_fewshot_template_yaml").read_text()
)
FILTERS = {"strict": "strict-match", "flexible": "flexible-extract"}
Expected = tuple[str | None, bool]  # extracted answer, verdict


def params(*rows: tuple[Any, ...]) -> list[Any]:
    """Parameters of a test from rows that begin with an id."""
    return [pytest.param(*row, id=name) for name, *row in rows]


def lm_eval_extract(task: dict[str, Any], name: str, text: str) -> str:
    """What lm-eval's own filter extracts from `text`, with the settings in the task's file."""
    [chain] = [entry["filter"] for entry in task["filter_list"] if entry["name"] == name]
    assert [step["function"] for step in chain] == ["regex", "take_first"]
    settings = {key: value for key, value in chain[0].items() if key != "function"}
    return next(iter(RegexFilter(**settings).apply([[text]], [{}])))[0]


def lm_eval_verdict(task: dict[str, Any], name: str, text: str, target: str) -> bool:
    """Whether lm-eval's metric accepts what its filter extracts from `text`."""
    [metric] = task["metric_list"]
    no_settings = ("metric", "aggregation", "higher_is_better")
    settings = {key: value for key, value in metric.items() if key not in no_settings}
    predictions = [lm_eval_extract(task, name, text)]
    return bool(
        exact_match_fn(predictions=predictions, references=[target], **settings)["exact_match"]
    )


@pytest.fixture(scope="module")
def minerva() -> ModuleType:
    """lm-eval's minerva_math. Its metric `exact_match` requires another version of antlr, which is
    pretended to be installed, and is disabled."""
    module = ModuleType("minerva_math_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda _: "4.11.0")
        exec((TASKS / "minerva_math/utils.py").read_text(), module.__dict__)
    vars(module)["is_equiv"] = lambda *_: False
    return module


@pytest.mark.parametrize("task", GRADERS)
@pytest.mark.parametrize("answer", [None, "", "  \n", "I cannot tell."])
def test_no_answer_is_wrong_by_every_grader(task: str, answer: str | None) -> None:
    """None stands for a thought without EoL, which contains no answer. Every grader still gives a
    verdict, in order, since otherwise accuracies would have different denominators."""
    verdicts = grade(task, answer, "A")
    assert [*verdicts.items()] == [(name, Verdict(None, False)) for name in GRADERS[task]]


STATEMENTS = [
    ("It stops at 7.", "7"), (" It stops at 7. It starts at 3.", "7"), ("\n\nIt stops at 7.", "7"),
    ("It stops at 6.Mia turns a dial from 1:", "6"), ("It stops at 48.", "48"),
    ("It stops at 1,234,567.", "1,234,567"), ("It stops at 3.25. Then 9.", "3.25"),
    ("It stops at -4.", "-4"), ("It stops at −4.", "−4"), ("It stops at .5.", ".5"),
    # What the models of the laptop run wrote: the number of the statement counts, no later one.
    ("It stops at 4.\x04: first up by 1 to", "4"), ("It stops at 3.\x04 0: first up by 2", "3"),
    ("It stops at 9. dow 9: first down by 1", "9"), ("It stops at 4. : first down by 2", "4"),
    # No statement, or not at once.
    ("It stops at 7", None), ("It stops at 7,", None), ("It stops at 7 or 8.", None),
    ("It stops at four.", None), ("It stops at $7.", None), ("It stops at 1,2345.", None),
    ("it stops at 7.", None), ("So It stops at 7.", None), ("It is 7.", None), ("7.", None),
    ("Dial from 8: first up by 3 to 1. It stops at 7.", None), ("", None), ("  \n ", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "number"), STATEMENTS)
def test_only_the_stated_result_is_read(text: str, number: str | None) -> None:
    """The completion must begin with the statement; what comes after it says nothing."""
    verdict = Verdict(number, number is not None)
    assert grade("questions", text, f"It stops at {number or 7}.") == {"number": verdict}


def test_the_form_of_the_statement_is_that_of_the_gold_answer() -> None:
    """Its words are fixed, and are not a pattern; its number is compared as a number."""
    gold = "The answer (mod 10) is 1,000."
    for text, correct in (
        ("The answer (mod 10) is 1000.", True),
        ("The answer (mod 10) is 999.", False),
        ("The answer mod 10 is 1000.", False),
    ):
        assert grade("questions", text, gold)["number"].correct is correct


SAME = [
    ("7", "7", True), ("7.0", "7", True), ("7.50", "7.5", True), ("1,000", "1000", True),
    ("1000", "1,000", True), ("07", "7", True), ("-0", "0", True), ("-4", "4", False),
    ("7", "8", False), ("70", "7", False), ("0.1", "0.10000001", False), (None, "7", False),
    (None, "", False), ("7", "seven", False), ("seven", "seven", True), ("−4", "-4", True),
    (".5", "0.5", True), ("9007199254740993", "9007199254740992", False),
]  # fmt: skip


@pytest.mark.parametrize(("number", "gold", "expected"), SAME)
def test_the_same_number(number: str | None, gold: str, expected: bool) -> None:
    """Commas and trailing zeros do not matter; any other difference makes another number."""
    assert same_number(number, gold) is expected


NUMBERS = params(  # answer, gold, expected for `flexible` and `strict`, whether lm-eval agrees
    ("full stop", "So 9 + 9. The answer is 18.", "18", ("18", True), ("18", True), True),
    ("goes on", "The answer is 18. Q: Two of 7?", "18", ("7", False), ("18", True), True),
    ("two answers", "The answer is 18. The answer is 5.", "18", ("5", False), ("18", True), True),
    ("no full stop", "The answer is 18", "18", ("18", True), ("1", False), True),
    ("line ends", "The answer is 18.\n", "18", ("18", True), ("18", True), True),
    ("another phrase", "the answer is 18.", "18", ("18", True), (None, False), True),
    ("decimal", "The answer is 5.5.", "5.5", ("5.5", True), ("5.5", True), True),
    ("decimal goes on", "The answer is 5.5. Yes", "5.5", ("5.5", True), ("5.5", True), True),
    ("commas", "The answer is 1,234.", "1234", ("1,234", True), ("1,234", True), True),
    ("commas in gold", "The answer is 1234.", "1,234", ("1234", True), ("1234", True), True),
    ("dollars", "The answer is $18.", "18", ("18", True), (None, False), True),
    ("text after", "The answer is 18 dollars.", "18", ("18", True), ("18", True), True),
    ("comma after", "The answer is 18, or so.", "18", ("18", True), ("18", True), True),
    ("negative", "The answer is -5.", "-5", ("-5", True), ("-5", True), True),
    ("other sign", "The answer is -5.", "5", ("-5", False), ("-5", False), True),
    ("dots come last", "It is 18 ...", "18", (None, False), (None, False), True),
    ("no number", "1.2.3 is a version.", "12", ("1.2.3", False), (None, False), True),
    ("trailing zeros", "The answer is 18.00.", "18", ("18.00", True), ("18.00", True), False),
    ("money", "The answer is $1,234.50.", "1234.5", ("1,234.50", True), (None, False), False),
    ("dots", "The answer is 18...", "18", ("18", True), ("18", True), False),
    ("unicode minus", "The answer is −5.", "-5", ("-5", True), ("-5", True), False),
    ("unicode minus, other sign", "The answer is −5.", "5", ("-5", False), ("-5", False), False),
)  # fmt: skip


@pytest.mark.parametrize(("answer", "gold", "flexible", "strict", "agreed"), NUMBERS)
def test_gsm8k(answer: str, gold: str, flexible: Expected, strict: Expected, agreed: bool) -> None:
    """The number that each filter extracts, compared with the one after GSM8K's ####. Accuracies
    are comparable with published ones only if verdicts equal lm-eval's; the differences that the
    module documents must exist."""
    verdicts = grade("gsm8k", answer, f"He has <<9+9=18>>18.\n#### {gold}")
    assert [*verdicts.items()] == [("flexible", Verdict(*flexible)), ("strict", Verdict(*strict))]
    theirs = [lm_eval_verdict(GSM8K, FILTERS[name], answer, gold) for name in verdicts]
    assert ([verdict.correct for verdict in verdicts.values()] == theirs) is agreed


@given(st.text("18-.,$ \n", max_size=8), st.sampled_from(["1", "-1", "18", "1.8", "811"]))
def test_gsm8k_differs_in_spelling_only(tail: str, gold: str) -> None:
    """For any text, the verdict compares the string that lm-eval extracts as a number."""
    answer = f"The answer is {tail}"
    for name, verdict in grade("gsm8k", answer, f"#### {gold}").items():
        theirs = lm_eval_extract(GSM8K, FILTERS[name], answer)
        try:
            same = Decimal(re.sub("[,$]", "", theirs).rstrip(".")) == Decimal(gold)
        except InvalidOperation:
            same = False
        assert verdict.correct == same
        assert same or not lm_eval_verdict(GSM8K, FILTERS[name], answer, gold)


LETTERS = params(  # text after "The answer is ", extracted letter, whether lm-eval accepts "B"
    ("as asked", "(B).", "B", True),
    ("no full stop", "(B)", "B", True),
    ("bare", "B.", "B", True),
    ("bare, no full stop", "B", "B", False),
    ("small", "b.", "B", True),
    ("small, in brackets", "(b).", "B", True),
    ("bold", "**(B)**", "B", True),
    ("bold in brackets", "(**B**).", "B", True),
    ("quoted", '"B".', "B", True),
    ("the choice's text", "(B) 12.", "B", False),
    ("a reason", "(B) because 2 > 1.", "B", False),
    ("next sentence", "B. It is not C.", "B", False),
    ("next line", "(B).\nQ: The answer is (C).", "B", True),
    ("nothing on the first line", "\nThe answer is (B).", "B", True),
    ("first of two", "(B). The answer is (C).", "B", False),
    ("another letter", "(C).", "C", False),
    ("no choice", "(E).", None, False),
    ("a word", "Because.", None, False),
    ("a word of two letters", "Be", None, True),
    ("an article", "a prime.", None, False),
    ("a sum", "(b + c)/2.", None, False),
    ("a number", "12.", None, False),
    ("late", "not clear. The answer is (B).", None, False),
)


@pytest.mark.parametrize(("tail", "letter", "theirs"), LETTERS)
def test_the_letter(tail: str, letter: str | None, theirs: bool) -> None:
    """It follows the first "answer is ". lm-eval's verdict differs at the end of a text without a
    full stop, and before a reason."""
    answer = f"2 > 1. The answer is {tail}"
    assert grade("mmlu_stem", answer, "B") == {"letter": Verdict(letter, letter == "B")}
    assert lm_eval_verdict(MMLU, "get-answer", answer, "(B)") is theirs


@given(st.text("aB(). *x_\n", max_size=6), st.sampled_from("ABC"))
def test_the_letter_is_never_missed(tail: str, gold: str) -> None:
    """What lm-eval accepts is correct, unless it removed a letter from the end of the line."""
    answer = f"The answer is {tail}"
    if lm_eval_verdict(MMLU, "get-answer", answer, f"({gold})"):
        line = tail.removeprefix("\n").split("\n")[0]
        assert grade("mmlu_stem", answer, gold)["letter"].correct or line[-1].isalpha()


MATH = params(  # gold, answer, extracted answer, correct
    ("half", r"\frac12", r"so $\frac{1}{2}$.", r"\frac{1}{2}", True),
    ("half, with a slash", r"\frac12", "1/2", "1/2", True),
    ("half, as a decimal", r"\frac12", "0.5", "0.5", True),
    ("half, for display", r"\frac12", r"$\dfrac{1}{2}$", r"\frac{1}{2}", True),
    ("a third, rounded", r"\frac13", "0.3", "0.3", False),
    ("interval", "[2,5)", "$[2,5)$", "[2,5)", True),
    ("interval, other ends", "[2,5)", "$(2,5]$", "(2,5]", False),
    ("interval for an inequality", "1<x<2", "$(1,2)$", "(1,2)", True),
    ("inequality for an interval", "(1,2)", "$1<x<2$", "1<x<2", False),
    ("set, other order", r"\{1,2\}", r"$\{2,1\}$", r"\{2,1\}", True),
    ("set, other element", r"\{1,2\}", r"$\{1,3\}$", r"\{1,3\}", False),
    ("list", "1,2", "$2, 1$", "2, 1", True),
    ("tuple", "(1,2)", "$(1,2)$", "(1,2)", True),
    ("tuple, other order", "(1,2)", "$(2,1)$", "(2,1)", False),
    ("expression", "x^2+1", "$1+x^2$", "1+x^2", True),
    ("unknown on the left", "3", "$x=3$", "x=3", True),
    ("word", r"\text{even}", r"$\text{even}$", r"\text{even}", True),
    ("dollars", "18", "It costs $18.", "18", True),
    ("escaped dollars", r"\$18", r"$\$18$", "18", True),
    ("dollars in words", "18", "18 dollars", "18", True),
    ("unit", r"5\text{ cm}", "5 cm", "5", True),
    ("unit in latex", "5", r"$5\text{ m}$", "5", True),
    ("degrees", r"90^\circ", "90 degrees", "90", True),
    ("percent", r"20\%", r"$20\%$", r"20\%", True),
    ("percent, outside", "20", "20%", "20", True),
    ("commas", "1{,}000", "1,000", "1000", True),
    ("commas in latex", r"1,\!000", "$1000$", "1000", True),
    ("money", "1234.5", "The answer is $1,234.50.", "1234.50", True),
    ("decimal", "5.5", "The answer is 5.5.", "5.5", True),
    ("negative", "-4", "-4", "-4", True),
    ("unicode minus", "-4", "$−4$", "−4", True),
    ("unicode minus, other sign", "4", "$−4$", "−4", False),
    ("text after", "16", r"Thus $x=\boxed{16}$. It took 3 steps.", "16", True),
    ("minerva's phrase", "16", "Final Answer: The final answer is $16$. I hope 7.", "16", True),
    ("last box", "16", r"\boxed{3} is too small. Again: \boxed{16}", "16", True),
    ("a comma joins boxes", "16", r"\boxed{3} is small, so again: \boxed{16}", "3,16", False),
    ("boxes of a list", "1,2", r"\boxed{1} or \boxed{2}", "1,2", True),
    ("gold of two boxes", r"1}$ and $\boxed{2", "$2$ and $1$", "2 and 1", True),
    ("gold of two boxes, one", r"1}$ and $\boxed{2", "$1$", "1", False),
    ("gold's last box", r"1}$, too small. So we try $\boxed{2", "$2$", "2", True),
    ("gold's first box", r"1}$, too small. So we try $\boxed{2", "$1$", "1", False),
    ("nothing", "16", "no idea", None, False),
    ("open box", "16", r"\boxed{16", None, False),
    ("open fraction", "16", r"$\frac{16$", r"\frac{16", False),
    ("empty fraction", "16", r"$\frac{}{}$", r"\frac{}{}", False),
    ("no number", "16", r"$\frac{1}{0}$", r"\frac{1}{0}", False),
    ("many brackets", "1", "(" * 3000 + "1", None, False),
    ("many digits", "1", "1" * 5000, None, False),
    ("control signs", "1", "\x00 \ud800", None, False),
)  # fmt: skip


@pytest.mark.parametrize(("gold", "answer", "extracted", "correct"), MATH)
def test_mathematics(
    minerva: ModuleType, gold: str, answer: str, extracted: str | None, correct: bool
) -> None:
    """An equal expression in another notation is correct, everything else is wrong, and nothing
    raises. lm-eval's metric `math_verify` gives the same verdict."""
    solution = rf"We see that it is $\boxed{{{gold}}}$."
    assert grade("math", answer, solution) == {"math_verify": Verdict(extracted, correct)}
    theirs = minerva.process_results({"solution": solution, "answer": gold}, [answer])
    assert theirs["math_verify"] == correct


@pytest.mark.parametrize(
    ("answer", "extracted"),
    [
        ("$9^{9^{9^9}}$", "9^{9^{9^9}}"),
        ("9^9^9^9", "9^9^9^9"),
        ("$(10^{8})!$", "(10^{8})!"),
        ("$(9^{9^{9^9}},9^{9^9})$", None),  # parsing already takes too long
    ],
)
def test_an_endless_computation_is_wrong(
    answer: str, extracted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One absurd answer may delay an evaluation by a few of math_verify's time limits of 5 s, but
    not stop it, and no alarm remains set.

    The alarms go off five times as early here. Where none is set, an alarm of 60 s goes to
    pytest-timeout, so that a computation without a time limit fails the test.
    """
    grade("math", "8", r"$\boxed{9}$")  # initialises the parser, which an alarm must not interrupt
    alarms: list[int] = []
    expired: list[int] = []

    def early_alarm(seconds: int) -> None:
        alarms.append(seconds)
        handler: Any = signal.getsignal(signal.SIGALRM)

        def expire(*arguments: Any) -> None:
            expired.append(seconds)
            handler(*arguments)

        if seconds:
            signal.signal(signal.SIGALRM, expire)
        signal.setitimer(signal.ITIMER_REAL, seconds / 5 or 60)

    monkeypatch.setattr(signal, "alarm", early_alarm)
    verdicts = grade("math", answer, r"$\boxed{9}$")
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert verdicts == {"math_verify": Verdict(extracted, False)}
    assert (max(alarms), alarms[-1]) == (5, 0)
    assert 1 <= len(expired) <= 4


def test_grading_in_a_thread_is_an_error() -> None:
    """Without its alarm math_verify may never end, and a verdict "wrong" would look like a
    result."""
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="threaded environment"):
        pool.submit(grade, "math", "9", r"$\boxed{9}$").result()
