"""Prompts: lm-eval's own in raw space, the same shots split in latent space, and what fits."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from boltlm.corpus.benchmarks import STEM
from boltlm.errors import UserError
from boltlm.evaluation import downstream, prompts
from boltlm.evaluation.downstream import Asking, Spec
from boltlm.evaluation.grading import GRADERS, grade
from boltlm.evaluation.prompts import FORMS, OPENING, Shot, encode, fitting, render, shots
from boltlm.tokens import EOL, MARKERS, POST, PRIOR, SOL, TextCoder
from tests import tiny
from tests.evaluation import upstream

SHOTS = {"gsm8k": 8, "math": 4, "mmlu_stem": 4}
# What lm-eval's shots say, and what FLAN's authors wrote: the only differences that are wanted.
LOST = {
    "abstract_algebra": [("$\nactorial{n}$", r"$\factorial{n}$"), ("\nightarrow", r"\rightarrow")],
    "college_biology": [("\frac{1}{400}", r"\frac{1}{400}")],
    "college_chemistry": [("\nrac{1}{2}", r"\frac{1}{2}")],
    "high_school_chemistry": [("\nrac{[H^", r"\frac{[H^"), ("\nrac{10^", r"\frac{10^")],
}
SUBJECTS = [("gsm8k", ""), ("math", ""), *(("mmlu_stem", subject) for subject in STEM)]
# What each synthetic shot asks for, worked out by hand.
RIGHT = {
    "gsm8k": [f"#### {n}" for n in (32, 66, 15, 370, 54, 10, 345, 20)],
    "math": [rf"$\boxed{{{x}}}$" for x in ("6", "24", r"\frac{1}{9}", "(-3,1]")],
    "mmlu_stem": list("CADB"),
}


@pytest.fixture(scope="module")
def wide(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose window takes every prompt."""
    return upstream.wide(base_folder, tmp_path_factory.mktemp("wide"))


def ours(spec: str, where: str, tokenizer: Path, **more: Any) -> Any:
    asking = Asking(where=where, tokenizer=tokenizer, answer_tokens=10, **more)
    (task,) = downstream.load(Spec.of(spec), asking)["tasks"].values()
    return task


@pytest.mark.parametrize("task", upstream.BENCHMARKS)
def test_raw_prompts_are_lm_evals(task: str, wide: Path, tmp_path: Path) -> None:
    """Shares are comparable with published ones only if the questions are asked in the same words.
    Nothing differs but the backslashes that lm-eval's shots lost, and no BOS is put before."""
    rows = upstream.rows(task)
    mine = ours(f"{task}/standard/raw", upstream.write(tmp_path, task, rows), wide)
    found = [(doc["subject"], doc["prompt"]) for doc in mine.eval_docs]
    expected = []
    for subject, their in upstream.theirs(task, rows).items():
        for prompt in upstream.requested(their):
            for broken, whole in LOST.get(subject, ()):
                assert broken in prompt
                prompt = prompt.replace(broken, whole)
            expected.append(("" if task == "gsm8k" else subject, prompt))
    assert len(found) == len(rows) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == other
    assert upstream.requested(mine) == [prompt for _, prompt in found]
    assert {doc["shots"] for doc in mine.eval_docs} == {SHOTS[task]}
    assert {doc["lost_shots"] for doc in mine.eval_docs} == {0}


@pytest.mark.parametrize(("task", "subject"), SUBJECTS)
@pytest.mark.parametrize("which", ["standard", "synthetic"])
def test_shots_are_split_in_latent_space(task: str, subject: str, which: prompts.Prompts) -> None:
    """A model that writes its answer into the latent, or thinks behind it, is asked something else
    than what it was trained on: the thought stands inside alone, the answer's sentence behind EoL
    and white space, and nothing of the raw shot is lost but the nudge."""
    form = FORMS[task]
    description, found = shots(task, which, subject)
    assert len(found) == SHOTS[task]
    text = render(form, description, found, "Why?", "latent")
    assert text.startswith(description)
    assert text.endswith(f"\n\n{form.before}Why?{form.after}{OPENING}")
    raw = render(form, description, found, "Why?", "raw")
    for shot in found:
        asked = f"{form.before}{shot.question}{form.after}"
        assert f"{asked} {shot.target}\n\n" in raw
        match = re.match(
            f"{re.escape(SOL + PRIOR)}(.+?){re.escape(EOL)}( {form.answer} [^\n]+)\n\n",
            text.partition(asked)[2],
            re.DOTALL,
        )
        assert match, shot
        thought, answer = match.groups()
        assert thought.strip() == thought
        assert form.answer.lower() not in thought.lower()
        assert form.nudge == "" or form.nudge not in thought
        assert f"{form.nudge} {thought}{answer}".split() == shot.target.split()
    assert text.count(SOL) == text.count(PRIOR) == text.count(EOL) + 1 == len(found) + 1
    assert POST not in text


@pytest.mark.parametrize("task", RIGHT)
def test_synthetic_shots_are_right(task: str) -> None:
    """A wrong example, or one that its own grader cannot read, teaches wrong answers."""
    _, found = shots(task, "synthetic", STEM[0])
    answers = [shot.parts(FORMS[task])[1] for shot in found]
    for answer, gold in zip(answers, RIGHT[task], strict=True):
        verdicts = grade(task, answer, gold)
        assert tuple(verdicts) == GRADERS[task]
        assert all(verdict.correct for verdict in verdicts.values()), (answer, gold)


def test_synthetic_questions_are_new() -> None:
    """The two sets of prompts are two measurements only if they share no question; and none of them
    may be a question that is asked or trained on."""
    standard = {
        shot.question.partition("\n(A)")[0]
        for task, subject in SUBJECTS
        for shot in shots(task, "standard", subject)[1]
    }
    files = ("gsm8k_train", "gsm8k_test", "mmlu_stem_dev", "mmlu_stem_val", "mmlu_stem_test")
    asked = {row["question"].strip() for name in files for row in upstream.real(name)}
    found = [shot.question for task in RIGHT for shot in shots(task, "synthetic", "")[1]]
    synthetic = {question.partition("\n(A)")[0] for question in found}
    assert len(synthetic) == len(found) == sum(SHOTS.values())
    assert synthetic.isdisjoint(standard | asked)


def test_questions_have_no_shots() -> None:
    """The corpus's own questions go on from the page, so there is nothing to show before them."""
    assert shots("questions", "standard", "") == ("", ())
    with pytest.raises(UserError, match="questions/standard"):
        shots("questions", "synthetic", "")
    form = FORMS["questions"]
    assert render(form, "", (), "Page.", "raw") == "Page."
    assert render(form, "", (), "Page.", "raw", SOL + EOL) == f"Page.{SOL}{EOL}"
    assert render(form, "", (), "Page.", "latent", SOL + EOL) == f"Page.{SOL}{PRIOR}"


def test_a_missing_file_of_lm_eval_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of lm-eval may have moved its shots; that is no traceback."""
    with pytest.raises(UserError, match=r"lacks tasks/mmlu/.*mmlu_alchemy.yaml.*locked version"):
        shots("mmlu_stem", "standard", "alchemy")
    monkeypatch.setattr(prompts, "_installed", lambda _: "def other(): return []")
    with pytest.raises(UserError, match="lacks list_fewshot_samples"):
        prompts._standard.__wrapped__("math", "")


@pytest.mark.parametrize("space", ["latent", "raw"])
def test_as_many_shots_as_fit(base_coder: TextCoder, space: prompts.Space) -> None:
    """With BOS a prompt may fill its room to the last token; with one token less it loses exactly
    one shot, a whole one, the first of those that are left; and never the question."""
    form = FORMS["gsm8k"]
    found = [
        Shot(f"Where is {n} {'far ' * n}?", f"It is {n}. The answer is {n}.") for n in range(4)
    ]
    arguments = form, "Add.\n\n", found, "And 7?", space
    for kept in range(4, -1, -1):
        wanted = render(form, "Add.\n\n", found[4 - kept :], "And 7?", space)
        assert wanted.count("Where is") == kept
        size = 1 + len(encode(base_coder, wanted))
        assert fitting(base_coder, size, *arguments) == (wanted, kept)
        shorter, number = fitting(base_coder, size - 1, *arguments)
        assert number == kept - 1
        assert (shorter == "") is (kept == 0)
    assert fitting(base_coder, 10**6, *arguments)[1] == 4
    assert fitting(base_coder, 0, *arguments) == ("", -1)
    assert fitting(base_coder, -5, *arguments) == ("", -1)


def test_the_empty_pair_needs_room_too(base_coder: TextCoder) -> None:
    """What tells a model that no latent comes is part of the prompt that must fit."""
    arguments = FORMS["questions"], "", (), "Page.", "raw"
    size = 1 + len(encode(base_coder, "Page."))
    assert fitting(base_coder, size, *arguments) == ("Page.", 0)
    assert fitting(base_coder, size + 1, *arguments, SOL + EOL) == ("", -1)
    assert fitting(base_coder, size + 2, *arguments, SOL + EOL) == (f"Page.{SOL}{EOL}", 0)


def test_the_room_is_what_the_answer_leaves(base_folder: Path, tmp_path: Path) -> None:
    """Prompt, BOS and the longest answer fill the window exactly where one shot more would not fit:
    otherwise lm-eval cuts prompts from the left, unseen."""
    coder = TextCoder(base_folder)
    where = upstream.write(tmp_path, "gsm8k", [{"question": "One?", "answer": "#### 1"}])
    _, found = shots("gsm8k", "standard", "")
    prompt = render(FORMS["gsm8k"], "", found[-1:], "One?", "raw")
    window = 1 + len(encode(coder, prompt)) + 10
    for room, kept in ((window, 1), (window - 1, 0), (window + 1, 1)):
        folder = upstream.wide(base_folder, tmp_path / str(room), room)
        (doc,) = ours("gsm8k/standard/raw", where, folder).eval_docs
        assert (doc["shots"], doc["lost_shots"]) == (kept, 8 - kept)
        assert (doc["prompt"] == prompt) is (kept == 1)


def test_text_between_special_tokens_is_encoded_alone(base_coder: TextCoder) -> None:
    """As in training rows: a piece's ids do not hang on its neighbours, a marker is one id."""
    m = base_coder.markers
    named = {SOL: m.sol, EOL: m.eol, PRIOR: m.prior, POST: m.post}
    assert tuple(named) == MARKERS
    pieces = ["It is 3.", SOL, PRIOR, " So 3", EOL, " is it. ", SOL, POST, EOL, "\n\n"]
    expected: list[int] = []
    for piece in pieces:
        expected += [named[piece]] if piece in named else base_coder.encode(piece)
    assert encode(base_coder, "".join(pieces)) == expected
    assert encode(base_coder, "") == []
    assert encode(base_coder, SOL) == [m.sol]


def test_text_that_looks_like_bos_stays_text(base_coder: TextCoder) -> None:
    """A document's begin and end are never said by a prompt; its only BOS is the back end's."""
    m = base_coder.markers
    for text in (tiny.BOS, tiny.EOS, "<s>", *map(_name(base_coder), (m.bos, m.eos))):
        ids = encode(base_coder, f"a{text}b")
        assert not {m.bos, m.eos, *dataclasses.astuple(m)} & {*ids}
        assert base_coder.decode(ids) == f"a{text}b"


def _name(coder: TextCoder) -> Any:
    return coder.tokenizer.id_to_token
