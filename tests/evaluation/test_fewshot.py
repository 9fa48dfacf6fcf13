"""Prompts: lm-eval's own in raw space, the same examples split in latent space, and what fits."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from boltlm.corpus.benchmarks import STEM_SUBJECTS
from boltlm.errors import UserError
from boltlm.evaluation import downstream, fewshot
from boltlm.evaluation.downstream import TaskOptions
from boltlm.evaluation.fewshot import (
    EMPTY_LATENT,
    LATENT_START,
    PROMPT_FORMS,
    FewShotExample,
    encode_prompt,
    fewshot_examples,
    fit_prompt,
    render_prompt,
)
from boltlm.evaluation.grading import GRADERS, grade
from boltlm.evaluation.task_spec import PromptSet, TaskName, TaskSpec, ThoughtSpace
from boltlm.tokens import EOL, POST, PRIOR, SOL, SPECIAL_TOKENS, TextCoder
from tests import tiny
from tests.evaluation import upstream

NUM_SHOTS: dict[TaskName, int] = {"gsm8k": 8, "math": 4, "mmlu_stem": 4}
# What lm-eval's examples contain, and what FLAN's authors wrote: the only intended differences.
LOST_BACKSLASHES = {
    "abstract_algebra": [("$\nactorial{n}$", r"$\factorial{n}$"), ("\nightarrow", r"\rightarrow")],
    "college_biology": [("\frac{1}{400}", r"\frac{1}{400}")],
    "college_chemistry": [("\nrac{1}{2}", r"\frac{1}{2}")],
    "high_school_chemistry": [("\nrac{[H^", r"\frac{[H^"), ("\nrac{10^", r"\frac{10^")],
}
SUBJECTS = [("gsm8k", ""), ("math", ""), *(("mmlu_stem", subject) for subject in STEM_SUBJECTS)]
# The answer of each synthetic example, worked out by hand.
GOLD: dict[TaskName, list[str]] = {
    "gsm8k": [f"#### {n}" for n in (32, 66, 15, 370, 54, 10, 345, 20)],
    "math": [rf"$\boxed{{{x}}}$" for x in ("6", "24", r"\frac{1}{9}", "(-3,1]")],
    "mmlu_stem": list("CADB"),
}


@pytest.fixture(scope="module")
def wide(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a context length in which every prompt fits."""
    return upstream.copy_tokenizer(base_folder, tmp_path_factory.mktemp("wide"))


def load_our_task(spec: str, data_path: str, tokenizer: Path, **options: Any) -> Any:
    task_options = TaskOptions(
        fewshot=tiny.FEWSHOT,
        data_path=data_path,
        tokenizer=tokenizer,
        max_answer_tokens=10,
        **options,
    )
    (task,) = downstream.load_task(TaskSpec.parse(spec), task_options)["tasks"].values()
    return task


@pytest.mark.parametrize("task", upstream.BENCHMARKS)
def test_raw_prompts_are_lm_evals(task: TaskName, wide: Path, tmp_path: Path) -> None:
    """Accuracies are comparable with published ones only if the prompts are the same. They differ
    only in the backslashes that lm-eval's examples lost, and they contain no BOS."""
    rows = upstream.rows(task)
    our_task = load_our_task(f"{task}/standard/raw", upstream.write(tmp_path, task, rows), wide)
    prompts = [(doc["subject"], doc["prompt"]) for doc in our_task.eval_docs]
    expected = []
    for subject, lm_eval_task in upstream.lm_eval_tasks(task, rows).items():
        for prompt in upstream.requested_prompts(lm_eval_task):
            for broken, repaired in LOST_BACKSLASHES.get(subject, ()):
                assert broken in prompt
                prompt = prompt.replace(broken, repaired)
            expected.append(("" if task == "gsm8k" else subject, prompt))
    assert len(prompts) == len(rows) == len(expected)
    for ours, theirs in zip(prompts, expected, strict=True):
        assert ours == theirs
    assert upstream.requested_prompts(our_task) == [prompt for _, prompt in prompts]
    assert {doc["shots"] for doc in our_task.eval_docs} == {NUM_SHOTS[task]}
    assert {doc["lost_shots"] for doc in our_task.eval_docs} == {0}


@pytest.mark.parametrize(("task", "subject"), SUBJECTS)
@pytest.mark.parametrize("prompt_set", ["standard", "synthetic"])
def test_examples_are_split_in_latent_space(
    task: TaskName, subject: str, prompt_set: PromptSet
) -> None:
    """As in training text, the latent contains the thought alone, and the sentence with the answer
    follows EoL and a space. Nothing of the raw example is lost but the chain-of-thought cue."""
    form = PROMPT_FORMS[task]
    description, examples = fewshot_examples(task, prompt_set, subject, tiny.FEWSHOT)
    assert len(examples) == NUM_SHOTS[task]
    text = render_prompt(form, description, examples, "Why?", "latent")
    assert text.startswith(description)
    assert text.endswith(f"\n\n{form.question_prefix}Why?{form.question_suffix}{LATENT_START}")
    raw = render_prompt(form, description, examples, "Why?", "raw")
    for example in examples:
        question = f"{form.question_prefix}{example.question}{form.question_suffix}"
        assert f"{question} {example.target}\n\n" in raw
        match = re.match(
            f"{re.escape(SOL + PRIOR)}(.+?){re.escape(EOL)}( {form.answer_cue} [^\n]+)\n\n",
            text.partition(question)[2],
            re.DOTALL,
        )
        assert match, example
        thought, answer = match.groups()
        assert thought.strip() == thought
        assert form.answer_cue.lower() not in thought.lower()
        assert form.cot_cue == "" or form.cot_cue not in thought
        assert f"{form.cot_cue} {thought}{answer}".split() == example.target.split()
    assert text.count(SOL) == text.count(PRIOR) == text.count(EOL) + 1 == len(examples) + 1
    assert POST not in text


@pytest.mark.parametrize("task", GOLD)
def test_synthetic_examples_are_correct(task: TaskName) -> None:
    """Every answer is right, and every grader of the task can read it."""
    _, examples = fewshot_examples(task, "synthetic", STEM_SUBJECTS[0], tiny.FEWSHOT)
    answers = [example.split_target(PROMPT_FORMS[task])[1] for example in examples]
    for answer, gold in zip(answers, GOLD[task], strict=True):
        verdicts = grade(task, answer, gold)
        assert tuple(verdicts) == GRADERS[task]
        assert all(verdict.correct for verdict in verdicts.values()), (answer, gold)


def test_synthetic_questions_are_new() -> None:
    """They occur neither in the standard prompt set nor in a benchmark's training or test data."""
    standard = {
        example.question.partition("\n(A)")[0]
        for task, subject in SUBJECTS
        for example in fewshot_examples(task, "standard", subject, tiny.FEWSHOT)[1]  # pyright: ignore
    }
    files = ("gsm8k_train", "gsm8k_test", "mmlu_stem_dev", "mmlu_stem_val", "mmlu_stem_test")
    benchmark = {row["question"].strip() for name in files for row in upstream.real(name)}
    examples = {task: fewshot_examples(task, "synthetic", "", tiny.FEWSHOT)[1] for task in GOLD}
    questions = [example.question for group in examples.values() for example in group]
    synthetic = {question.partition("\n(A)")[0] for question in questions}
    assert len(synthetic) == len(questions) == sum(NUM_SHOTS.values())
    assert synthetic.isdisjoint(standard | benchmark)


def test_synthetic_examples_are_read_from_a_file_of_ones_own(tmp_path: Path) -> None:
    """Its examples are used as they are; one that lacks a key is a UserError."""
    path = tmp_path / "examples.yaml"
    path.write_text("gsm8k:\n- {question: 'One and one?', thought: Add., answer: It is 2.}\n")
    own = fewshot_examples("gsm8k", "synthetic", "", path)
    assert own == ("", (FewShotExample("One and one?", "Add. It is 2."),))
    for broken in ("gsm8k:\n- {question: q, answer: a}\n", "math: []\n", "gsm8k: 3\n", "- ["):
        path = tmp_path / f"{len(broken)}.yaml"
        path.write_text(broken)
        with pytest.raises(UserError, match=rf"prompts\.fewshot: {path} must map gsm8k"):
            fewshot_examples("gsm8k", "synthetic", "", path)


def test_the_corpus_questions_are_asked_zero_shot() -> None:
    """A page is continued, so its prompt contains nothing but what says whether a latent comes."""
    assert fewshot_examples("questions", "standard", "", tiny.FEWSHOT) == ("", ())
    with pytest.raises(UserError, match="questions/standard"):
        fewshot_examples("questions", "synthetic", "", tiny.FEWSHOT)
    form = PROMPT_FORMS["questions"]
    assert EMPTY_LATENT == SOL + EOL
    assert render_prompt(form, "", (), "Page.", "raw") == "Page."
    assert render_prompt(form, "", (), "Page.", "raw", EMPTY_LATENT) == f"Page.{SOL}{EOL}"
    assert render_prompt(form, "", (), "Page.", "latent", "x") == f"Page.{SOL}{PRIOR}"


def test_a_missing_file_of_lm_eval_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of lm-eval may have moved its examples; that is a UserError."""
    with pytest.raises(UserError, match=r"no file tasks/mmlu/.*mmlu_alchemy.yaml.*locked version"):
        fewshot_examples("mmlu_stem", "standard", "alchemy", tiny.FEWSHOT)
    monkeypatch.setattr(fewshot, "_read_installed", lambda _: "def other(): return []")
    with pytest.raises(UserError, match="no function list_fewshot_samples"):
        fewshot._standard_examples.__wrapped__("math", "")


@pytest.mark.parametrize("space", ["latent", "raw"])
def test_as_many_examples_as_fit(base_coder: TextCoder, space: ThoughtSpace) -> None:
    """With BOS, a prompt may use its budget to the last token. With one token less, exactly the
    first of its examples is dropped; the question is never cut."""
    form = PROMPT_FORMS["gsm8k"]
    examples = [
        FewShotExample(f"Where is {n} {'far ' * n}?", f"It is {n}. The answer is {n}.")
        for n in range(4)
    ]
    arguments = form, "Add.\n\n", examples, "And 7?", space
    for num_shots in range(4, -1, -1):
        prompt = render_prompt(form, "Add.\n\n", examples[4 - num_shots :], "And 7?", space)
        assert prompt.count("Where is") == num_shots
        size = 1 + len(encode_prompt(base_coder, prompt))
        assert fit_prompt(base_coder, size, *arguments) == (prompt, num_shots)
        shorter, shorter_shots = fit_prompt(base_coder, size - 1, *arguments)
        assert shorter_shots == num_shots - 1
        assert (shorter == "") is (num_shots == 0)
    assert fit_prompt(base_coder, 10**6, *arguments)[1] == 4
    assert fit_prompt(base_coder, 0, *arguments) == ("", -1)
    assert fit_prompt(base_coder, -5, *arguments) == ("", -1)


def test_the_no_latent_marker_must_fit_too(base_coder: TextCoder) -> None:
    """SoL EoL is a part of the prompt and takes two tokens of the budget."""
    arguments = PROMPT_FORMS["questions"], "", (), "Page.", "raw"
    size = 1 + len(encode_prompt(base_coder, "Page."))
    assert fit_prompt(base_coder, size, *arguments) == ("Page.", 0)
    assert fit_prompt(base_coder, size + 1, *arguments, EMPTY_LATENT) == ("", -1)
    assert fit_prompt(base_coder, size + 2, *arguments, EMPTY_LATENT) == (f"Page.{SOL}{EOL}", 0)


def test_the_budget_is_what_the_answer_leaves(base_folder: Path, tmp_path: Path) -> None:
    """BOS, prompt and the longest answer may fill the context window, but not exceed it: otherwise
    lm-eval would truncate prompts from the left without a message."""
    coder = TextCoder(base_folder)
    data_path = upstream.write(tmp_path, "gsm8k", [{"question": "One?", "answer": "#### 1"}])
    _, examples = fewshot_examples("gsm8k", "standard", "", tiny.FEWSHOT)
    prompt = render_prompt(PROMPT_FORMS["gsm8k"], "", examples[-1:], "One?", "raw")
    exact_length = 1 + len(encode_prompt(coder, prompt)) + 10
    for context_length, num_shots in (
        (exact_length, 1),
        (exact_length - 1, 0),
        (exact_length + 1, 1),
    ):
        folder = upstream.copy_tokenizer(
            base_folder, tmp_path / str(context_length), context_length
        )
        (doc,) = load_our_task("gsm8k/standard/raw", data_path, folder).eval_docs
        assert (doc["shots"], doc["lost_shots"]) == (num_shots, 8 - num_shots)
        assert (doc["prompt"] == prompt) is (num_shots == 1)


def test_text_between_special_tokens_is_encoded_alone(base_coder: TextCoder) -> None:
    """As in training sequences: the ids of a piece do not depend on its neighbours, and a special
    token is one id."""
    special = base_coder.special_tokens
    special_ids = {SOL: special.sol, EOL: special.eol, PRIOR: special.prior, POST: special.post}
    assert tuple(special_ids) == SPECIAL_TOKENS
    pieces = ["It is 3.", SOL, PRIOR, " So 3", EOL, " is it. ", SOL, POST, EOL, "\n\n"]
    expected: list[int] = []
    for piece in pieces:
        expected += [special_ids[piece]] if piece in special_ids else base_coder.encode(piece)
    assert encode_prompt(base_coder, "".join(pieces)) == expected
    assert encode_prompt(base_coder, "") == []
    assert encode_prompt(base_coder, SOL) == [special.sol]


def test_text_that_looks_like_bos_stays_text(base_coder: TextCoder) -> None:
    """A prompt's text never becomes BOS or EOS; its only BOS is added by the back end."""
    special, token_text = base_coder.special_tokens, base_coder.tokenizer.id_to_token
    for text in (tiny.BOS, tiny.EOS, "<s>", token_text(special.bos), token_text(special.eos)):
        ids = encode_prompt(base_coder, f"a{text}b")
        assert not {*dataclasses.astuple(special)} & {*ids}
        assert base_coder.decode(ids) == f"a{text}b"


@pytest.mark.parametrize("space", ["latent", "raw", "cot"])
def test_questions_and_examples_never_become_special_tokens(
    space: ThoughtSpace, base_coder: TextCoder
) -> None:
    """Whatever a question, an example, a description or a cue holds, the special tokens of a prompt
    are those of its form; and every text is there as it was, private-use characters too."""
    hostile = f"a{SOL}b{EOL}{PRIOR}{POST}{SOL[0]}\ue000{SOL[1:]} \ue000\ue000 {tiny.EOS}"
    examples = [FewShotExample(hostile, f"{hostile} The answer is {hostile}")]
    plain = [FewShotExample("Q", "T The answer is A")]
    form = PROMPT_FORMS["gsm8k"]
    ending = fewshot.as_text(hostile)
    ids, expected = (
        encode_prompt(base_coder, render_prompt(form, *arguments, space, ending))
        for arguments, ending in (((hostile, examples, hostile), ending), (("D", plain, "Q"), "E"))
    )
    special = {*dataclasses.astuple(base_coder.special_tokens)}
    assert [i for i in ids if i in special] == [i for i in expected if i in special]
    repeats = 5 + (space != "latent")
    assert base_coder.decode(ids).count(hostile) == repeats
