"""This project's tasks, run by lm-eval: verdicts equal lm-eval's, every answer is in the table, and
accuracies and errors equal those computed by hand."""

import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from boltlm.errors import UserError
from boltlm.evaluation import downstream
from boltlm.evaluation.downstream import (
    DecodingConfig,
    TaskAnswer,
    TaskOptions,
    mean_accuracy,
    task_metrics,
)
from boltlm.evaluation.fewshot import PROMPT_FORMS, encode_prompt
from boltlm.evaluation.grading import GRADERS
from boltlm.evaluation.task_spec import TaskName, TaskSpec, ThoughtSpace
from boltlm.evaluation.tasks.loading import split_completion
from boltlm.records import Question, write_shard
from boltlm.tokens import EOL, POST, PRIOR, SOL, TextCoder
from tests import tiny
from tests.evaluation import upstream
from tests.evaluation.upstream import ScriptedLM, last_question


@pytest.fixture(scope="module")
def wide(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a context length in which every prompt fits."""
    return upstream.copy_tokenizer(base_folder, tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize("task", upstream.BENCHMARKS)
def test_verdicts_are_lm_evals(task: str, wide: Path, tmp_path: Path) -> None:
    """Our verdicts on the same model's answers equal lm-eval's, except for the differences that the
    task's file names; and those differences exist."""
    rows, templates = upstream.rows(task), upstream.COMPLETIONS[task]
    lm_eval_tasks = upstream.lm_eval_tasks(task, rows)
    questions = [
        last_question(prompt)
        for lm_eval_task in lm_eval_tasks.values()
        for prompt in upstream.requested_prompts(lm_eval_task)
    ]
    assert len({*questions}) == len(rows)
    spec = TaskSpec.parse(f"{task}/standard/raw")
    options = TaskOptions(
        fewshot=tiny.FEWSHOT,
        data_path=upstream.write(tmp_path, task, rows),
        tokenizer=wide,
        max_answer_tokens=9,
    )
    used: set[str] = set()
    for shift in range(1 if len(rows) > 200 else len(templates)):
        completions: dict[str, str] = {}
        expected: dict[str, tuple[set[str], set[str]]] = {}
        for question, row in zip(questions, rows, strict=True):
            fields = upstream.fields(task, row)
            # The last template contains a true minus sign, which is right where the gold is -4.
            usable = templates if fields.get("n", 0) >= 0 else templates[:-1]
            template, our_graders, their_graders = usable[
                (zlib.crc32(question.encode()) + shift) % len(usable)
            ]
            completions[question] = template.format(**fields)
            expected[question] = our_graders, their_graders
            used.add(template)
        model = ScriptedLM(lambda prompt, texts=completions: texts[last_question(prompt)])
        ours: dict[str, dict[str, bool]] = {}
        for answer in downstream.run_task(model, spec, options):
            ours.setdefault(last_question(answer.prompt), {})[answer.grader] = answer.correct
        theirs = upstream.lm_eval_verdicts(lm_eval_tasks, model)
        assert len(ours) == len(theirs) == len(rows)
        for question, (our_graders, their_graders) in expected.items():
            case = question, completions[question]
            assert ours[question] == {name: name in our_graders for name in GRADERS[task]}, case
            assert theirs[question] == {name: name in their_graders for name in GRADERS[task]}, case
    assert used == {template for template, *_ in templates}


ITEMS = [
    {"question": f"How many are {n} and {n}?", "answer": f"They are {2 * n}.\n#### {2 * n}"}
    for n in range(1, 6)
]


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> str:
    return upstream.write(tmp_path_factory.mktemp("items"), "gsm8k", ITEMS)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions as the stage `split` writes them."""
    folder = tmp_path_factory.mktemp("questions")
    questions = [
        Question(
            question_id="q7",
            subject="up",
            prompt="A dial is at 3. Up 4.",
            stem="It is",
            answer="7",
            cluster="c",
        ),
        Question(
            question_id="q2",
            subject="down",
            prompt=" A dial is at 9. Down 7.",
            stem="It is",
            answer="2",
        ),
    ]
    write_shard(folder / "00000.parquet", Question, questions)
    return folder


def load_docs(spec: str, data_path: str, tokenizer: Path, **options: Any) -> list[dict[str, Any]]:
    task_options = TaskOptions(
        fewshot=tiny.FEWSHOT,
        data_path=data_path,
        tokenizer=tokenizer,
        max_answer_tokens=9,
        **options,
    )
    (task,) = downstream.load_task(TaskSpec.parse(spec), task_options)["tasks"].values()
    return list(task.eval_docs)


def test_lm_eval_can_load_the_tasks(items: str, pages: Path, tmp_path: Path) -> None:
    """The folder also works with `lm_eval --include_path`: every task, named like its file, with
    the graders as metrics. Without a model's context length, prompts have all their examples."""
    data_paths: dict[TaskName, str] = {
        "gsm8k": items,
        "math": upstream.write(tmp_path, "math", upstream.rows("math")),
        "mmlu_stem": upstream.write(tmp_path, "mmlu_stem", upstream.rows("mmlu_stem")),
        "questions": str(pages),
    }
    assert data_paths.keys() == PROMPT_FORMS.keys()
    for task, data_path in data_paths.items():
        manager = TaskManager(
            include_path=str(downstream.TASK_DIR),
            include_defaults=False,
            metadata={"data_path": data_path},
        )
        assert manager.all_tasks == sorted(f"boltlm_{name}" for name in PROMPT_FORMS)
        tasks: Any = manager.load(f"boltlm_{task}")
        (loaded,) = tasks["tasks"].values()
        config = loaded.config
        assert [metric["metric"] for metric in config.metric_list] == list(GRADERS[task])
        assert {*loaded.aggregation()} == {*loaded.higher_is_better()} == {*GRADERS[task]}
        assert all(loaded.higher_is_better().values())
        form = PROMPT_FORMS[task]
        assert form.question_prefix.strip() in ["", *config.generation_kwargs["until"]]
        docs = list(loaded.eval_docs)
        assert upstream.requested_prompts(loaded) == [doc["prompt"] for doc in docs]
        assert {doc["shots"] for doc in docs} == {form.num_shots}


def test_limit_samples_and_shots(items: str, wide: Path) -> None:
    """The first questions, each as often as it is sampled, its samples in a row. A zero-shot prompt
    is the question alone, and its examples do not count as lost."""
    decoding = DecodingConfig(samples=3)
    docs = load_docs("gsm8k/standard/raw", items, wide, limit=2, decoding=decoding)
    assert [(doc["id"], doc["sample"]) for doc in docs] == [
        (f"gsm8k-test-0000{n}", sample) for n in range(2) for sample in range(3)
    ]
    assert [doc["prompt"] for doc in docs[:3]] == [docs[0]["prompt"]] * 3
    assert len(load_docs("gsm8k/standard/raw", items, wide)) == len(ITEMS)
    for space, end in (("raw", ""), ("latent", f"{SOL}{PRIOR}")):
        doc = load_docs(f"gsm8k/synthetic/{space}", items, wide, zero_shot=True)[0]
        assert doc["prompt"] == f"Q: How many are 1 and 1?\nA:{end}"
        assert (doc["shots"], doc["lost_shots"]) == (0, 0)


def test_the_corpus_questions(pages: Path, wide: Path) -> None:
    """A page is continued: only the special tokens that say whether a latent comes are added."""
    for space, no_latent, end in (
        ("latent", False, SOL + PRIOR), ("raw", False, ""), ("raw", True, SOL + EOL),
    ):  # fmt: skip
        docs = load_docs(f"questions/standard/{space}", str(pages), wide, no_latent=no_latent)
        assert [(doc["id"], doc["cluster"], doc["prompt"], doc["gold"]) for doc in docs] == [
            ("q7", "c", f"A dial is at 3. Up 4.{end}", "It is 7."),
            ("q2", "q2", f" A dial is at 9. Down 7.{end}", "It is 2."),
        ]


def test_plain_text_thoughts(pages: Path, wide: Path) -> None:
    """In the space `cot` each question is asked with each cue, the model may think before the first
    sentence of the stated form, and the best cue gives the accuracy of the task."""
    completions = {
        "A dial is at 3. Up 4.": " It is 3. Then 4. It is 7.",  # its first statement counts
        "A dial is at 3. Up 4. Dial": " from 3, up by 4 to 7. It is 7.\x04 It is 8.",
        " A dial is at 9. Down 7.": " It is 2.",
        " A dial is at 9. Down 7. Dial": " 9, 8, so it is 2, It is 2.",
    }
    spec, model = TaskSpec.parse("questions/standard/cot"), ScriptedLM(completions.__getitem__)
    options = TaskOptions(
        fewshot=tiny.FEWSHOT,
        data_path=str(pages),
        tokenizer=wide,
        max_answer_tokens=9,
        cues=("", "Dial"),
    )
    answers = downstream.run_task(model, spec, options)
    assert {prompt for prompt, _ in model.requests} == completions.keys()
    assert [(a.question_id, a.cue, a.thought, a.extracted, a.correct) for a in answers] == [
        ("q7", 1, " ", "3", False),
        ("q7", 2, " from 3, up by 4 to 7. ", "7", True),
        ("q2", 1, " ", "2", True),
        ("q2", 2, " 9, 8, so it is 2, ", "2", True),
    ]
    metrics, name = task_metrics(answers, "tests"), spec.name
    accuracies = [metrics[f"{name}/{part}accuracy"] for part in ("cue1/", "cue2/", "")]
    assert accuracies == [0.5, 1.0, 1.0]
    assert metrics[f"{name}/accuracy_se"] == metrics[f"{name}/cue2/accuracy_se"] == 0
    counts = [metrics[f"{name}/{count}"] for count in ("best_cue", "questions", "clusters")]
    assert counts == [2, 2, 2]


@pytest.mark.parametrize(
    "decoding", [DecodingConfig(), DecodingConfig(temperature=0.6, top_k=50, top_p=0.9)]
)
@pytest.mark.parametrize("space", ["latent", "raw"])
def test_generation_settings(space: str, decoding: DecodingConfig, items: str, wide: Path) -> None:
    """Greedy decoding unless a temperature is given. An answer ends at the next question; in latent
    space also where another latent would begin, but not at EoL, after which the answer comes."""
    model = ScriptedLM(lambda _: "")
    options = TaskOptions(
        fewshot=tiny.FEWSHOT,
        data_path=items,
        tokenizer=wide,
        max_answer_tokens=17,
        decoding=decoding,
    )
    downstream.run_task(model, TaskSpec.parse(f"gsm8k/standard/{space}"), options)
    expected: dict[str, Any] = {"do_sample": False}
    if decoding.temperature:
        expected = {"do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 0.9}
    for prompt, settings in model.requests:
        until = settings.pop("until")
        assert "Q:" in until
        assert EOL not in until
        assert ({SOL, PRIOR, POST} <= {*until}) is (space == "latent")
        assert settings == {"max_gen_toks": 17, **expected}
        assert prompt.endswith(SOL + PRIOR) is (space == "latent")


def scripted(texts: list[str]) -> ScriptedLM:
    """A model that gives these answers in turn, whatever the prompt."""
    answers = iter(texts)
    return ScriptedLM(lambda _: next(answers))


@pytest.mark.parametrize("space", ["latent", "raw"])
def test_one_answer_for_each_grader_and_sample(space: str, items: str, wide: Path) -> None:
    """The table contains prompt, completion, extracted answer and verdict. An answer that is in the
    latent only, or in a latent without EoL, does not count."""
    texts = [
        f"1 + 1 is 2.{EOL} The answer is 2.",
        f"The answer is 2.{EOL} I cannot tell.",
        "The answer is 2.",
        f"So 4.{EOL} It is 4",
    ]
    if space == "raw":
        texts = ["The answer is 2.", "I cannot tell.", "", "It is 4"]
    spec = TaskSpec.parse(f"gsm8k/synthetic/{space}")
    options = TaskOptions(
        fewshot=tiny.FEWSHOT,
        data_path=items,
        tokenizer=wide,
        max_answer_tokens=9,
        decoding=DecodingConfig(samples=2, temperature=1.0),
        limit=2,
    )
    answers = downstream.run_task(scripted(texts), spec, options)
    graders = GRADERS["gsm8k"]
    assert [(a.question_id[-1], a.sample, a.grader) for a in answers] == [
        (str(n), sample, grader) for n in range(2) for sample in range(2) for grader in graders
    ]
    assert [a.completion for a in answers] == [text for text in texts for _ in graders]
    assert [a.correct for a in answers] == [True, True, False, False, False, False, True, False]
    assert [a.extracted for a in answers] == ["2", "2", None, None, None, None, "4", None]
    thoughts: list[Any] = ["1 + 1 is 2.", "The answer is 2.", "The answer is 2.", "So 4."]
    if space == "raw":
        thoughts = [None] * 4
    assert [a.thought for a in answers] == [thought for thought in thoughts for _ in graders]
    prompts = {doc["id"]: doc["prompt"] for doc in load_docs(spec.name, items, wide)}
    for answer in answers:
        assert (answer.task, answer.prompts, answer.space) == ("gsm8k", "synthetic", space)
        assert (answer.subject, answer.shots, answer.lost_shots) == ("", 8, 0)
        assert answer.prompt == prompts[answer.question_id]
        assert answer.gold == ITEMS[int(answer.question_id[-1])]["answer"]
    prefixes = dict.fromkeys(answer.metric_prefix for answer in answers)
    assert list(prefixes) == [spec.name, f"{spec.name}/strict"]


def test_thought_and_answer_of_a_completion() -> None:
    """The answer follows the first EoL; in raw space the complete text is the answer, in the space
    `cot` what begins with the first sentence of the form of the gold answer."""
    assert split_completion(f"a{EOL} b{EOL}c", "latent", "") == ("a", f" b{EOL}c")
    assert split_completion(EOL, "latent", "") == ("", "")
    assert split_completion("a", "latent", "") == ("a", None)
    assert split_completion(f"a{EOL}b", "raw", "") == (None, f"a{EOL}b")
    assert split_completion("a. It is 3. It is 4.", "cot", "It is 7.") == (
        "a. ", "It is 3. It is 4.",
    )  # fmt: skip
    assert split_completion("It is so.", "cot", "It is 7.") == ("It is so.", None)


def test_accuracies_by_hand_and_by_lm_eval(items: str, wide: Path) -> None:
    """Three samples of each of five questions, of which the fractions 1, 2/3, 1/3, 0 and 0 are
    correct. The error is over questions, since samples of one are not independent; lm-eval's own
    mean is the same."""
    correct = [(1, 1, 1), (1, 0, 1), (0, 1, 0), (0, 0, 0), (0, 0, 0)]
    texts = [
        f"It is {2 * n if is_correct else 99}."
        for n, samples in enumerate(correct, 1)
        for is_correct in samples
    ]
    spec = TaskSpec.parse("gsm8k/standard/raw")
    options = TaskOptions(
        fewshot=tiny.FEWSHOT,
        data_path=items,
        tokenizer=wide,
        max_answer_tokens=9,
        decoding=DecodingConfig(samples=3, temperature=1.0),
    )
    answers = downstream.run_task(scripted(texts), spec, options)
    fractions = [1, 2 / 3, 1 / 3, 0, 0]
    variance = sum((fraction - 0.4) ** 2 for fraction in fractions) / 4
    assert task_metrics(answers, "tests") == {
        "gsm8k/standard/raw/accuracy": pytest.approx(0.4),
        "gsm8k/standard/raw/accuracy_se": pytest.approx(math.sqrt(variance / 5)),
        "gsm8k/standard/raw/strict/accuracy": 0,
        "gsm8k/standard/raw/strict/accuracy_se": 0,
        "gsm8k/standard/raw/questions": 5,
        "gsm8k/standard/raw/clusters": 5,
        "gsm8k/standard/raw/shots": 8,
        "gsm8k/standard/raw/lost_shots_fraction": 0,
    }
    task = downstream.load_task(spec, options)
    results: Any = evaluate(scripted(texts), task, bootstrap_iters=0)
    (means,) = results["results"].values()
    assert means["flexible,none"] == pytest.approx(0.4)
    assert means["strict,none"] == 0


def answer(question_id: str, correct: bool, **changes: Any) -> TaskAnswer:
    return TaskAnswer(
        **{
            "task": "gsm8k", "prompts": "standard", "space": "raw", "subject": "", "level": "",
            "sample": 0, "shots": 8, "lost_shots": 0, "prompt": "Q", "completion": "A",
            "thought": None, "gold": "1", "grader": "flexible", "extracted": None,
            "question_id": question_id, "cluster": question_id, "cue": 0, "correct": correct,
            **changes,
        }
    )  # fmt: skip


def test_accuracy_and_its_error() -> None:
    """Questions have equal weights, however many samples they have; one question has no error."""
    answers = [answer("a", True), answer("a", False), answer("b", True), answer("c", False)]
    mean, error, clusters = mean_accuracy(answers)
    assert (mean, clusters) == (pytest.approx(0.5), 3)
    assert error == pytest.approx(np.std([0.5, 1, 0], ddof=1) / math.sqrt(3))
    mean, error, clusters = mean_accuracy(answers[:2])
    assert (mean, clusters) == (0.5, 1)
    assert math.isnan(error)


def test_accuracy_by_subject_and_level(wide: Path, tmp_path: Path) -> None:
    """MATH: each problem of the table has its subject and level, and the accuracies of groups have
    the errors and the numbers of questions of these groups alone."""
    kinds = [("Algebra", 1), ("Algebra", 5), ("Geometry", 1), ("Algebra", 1), ("Geometry", 1)]
    rows = [
        {"problem": "1 + 1?", "solution": r"$\boxed{2}$", "type": kind, "level": f"Level {level}"}
        for kind, level in kinds
    ]
    options = TaskOptions(
        data_path=upstream.write(tmp_path, "math", rows), tokenizer=wide, max_answer_tokens=9
    )
    texts = [f"Final Answer: The final answer is ${n}$." for n in (2, 3, 2, 3, 2)]
    spec = TaskSpec.parse("math/standard/raw")
    answers = downstream.run_task(scripted(texts), spec, options)
    table = [(a.subject, a.level, a.correct) for a in answers]
    algebra = [("Level 1", True), ("Level 5", False), ("Level 1", False)]
    geometry = [("Level 1", True), ("Level 1", True)]
    assert sorted(table) == sorted(
        [("algebra", *row) for row in algebra] + [("geometry", *row) for row in geometry]
    )
    metrics = task_metrics(answers, "tests")
    accuracy = {key.split("accuracy_by_")[1]: v for key, v in metrics.items() if "y_by_" in key}
    assert accuracy == pytest.approx(
        {
            "subject/algebra": 1 / 3,
            "subject/algebra_se": np.std([1, 0, 0], ddof=1) / math.sqrt(3),
            "subject/geometry": 1,
            "subject/geometry_se": 0,
            "level/Level 1": 3 / 4,
            "level/Level 1_se": np.std([1, 0, 1, 1], ddof=1) / 2,
            "level/Level 5": 0,
            "level/Level 5_se": math.nan,
        },
        nan_ok=True,
    )
    counts = {key.split("questions_by_")[1]: v for key, v in metrics.items() if "s_by_" in key}
    expected = {"subject/algebra": 3, "subject/geometry": 2, "level/Level 1": 4, "level/Level 5": 1}
    assert counts == expected


def test_repeated_problems_add_no_certainty() -> None:
    """Questions that ask for the same problem are one cluster: asked five times each, three
    problems give the mean and the error of three questions."""
    correct = {"a": True, "b": False, "c": True}
    once = [answer(name, value) for name, value in correct.items()]
    repeated = [
        answer(f"{name}{copy}", value, cluster=name)
        for name, value in correct.items()
        for copy in range(5)
    ]
    assert mean_accuracy(repeated) == pytest.approx(mean_accuracy(once))
    assert task_metrics(repeated, "tests")["gsm8k/standard/raw/clusters"] == 3


def test_lost_examples_and_questions_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """An accuracy with fewer examples is another measure: it is in the metrics and on standard
    error, as are questions that were not asked; thoughts without EoL are in the metrics. Each
    completion counts once, not once for each grader."""
    name, ended = "gsm8k/standard/latent", {"space": "latent", "completion": f"t{EOL} 1"}
    answers = [
        answer("a", True, **ended),
        answer("b", True, **ended | {"shots": 5, "lost_shots": 3}),
        answer("c", False, **ended | {"shots": -1, "lost_shots": 8, "completion": ""}),
        answer("d", False, **ended | {"completion": "no end"}),
        answer("e", False, **ended | {"completion": "The answer is 1."}),
    ]
    answers += [replace(first, grader="strict", correct=False) for first in answers]
    metrics = task_metrics(answers, "evaluate tiny")
    assert metrics[f"{name}/accuracy"] == 2 / 5
    assert metrics[f"{name}/strict/accuracy"] == 0
    assert metrics[f"{name}/questions"] == 5
    assert metrics[f"{name}/shots"] == (8 + 5 + 0 + 8 + 8) / 5
    assert metrics[f"{name}/lost_shots_fraction"] == 2 / 5
    assert metrics[f"{name}/unasked_fraction"] == 1 / 5
    assert metrics[f"{name}/invalid_fraction"] == 2 / 4
    output = capsys.readouterr()
    assert output.out == ""
    assert f"evaluate tiny: 2 of 5 prompts of {name} lost few-shot examples" in output.err
    assert f"evaluate tiny: 1 of 5 prompts of {name} do not fit" in output.err
    task_metrics([answer("a", True), answer("b", False)], "evaluate tiny")
    assert capsys.readouterr().err == ""


def test_a_question_that_does_not_fit(base_folder: Path, tmp_path: Path) -> None:
    """It has no prompt and counts as wrong, with all its examples lost; the other question is asked
    with the examples that fit."""
    rows = [{"question": "word " * n, "answer": "#### 1"} for n in (1, 1000)]
    data_path = upstream.write(tmp_path, "gsm8k", rows)
    options = TaskOptions(
        fewshot=tiny.FEWSHOT, data_path=data_path, tokenizer=base_folder, max_answer_tokens=9
    )
    model = ScriptedLM(lambda prompt: "The answer is 1." if prompt else "")
    spec = TaskSpec.parse("gsm8k/standard/raw")
    short, *_, long = downstream.run_task(model, spec, options)
    assert (long.prompt, long.shots, long.lost_shots, long.correct) == ("", -1, 8, False)
    assert short.correct
    assert short.shots + short.lost_shots == 8
    coder = TextCoder(base_folder)
    assert 1 + len(encode_prompt(coder, short.prompt)) + 9 <= coder.context_length


TASK_NAMES = r"\|".join(get_args(TaskName))
FORM = rf"\({TASK_NAMES}\)/\(standard\|synthetic\)/\(latent\|raw\|cot\)"


INVALID = [
    "", "gsm8k", "gsm8k/standard", "gsm8k/raw/standard", "gsm8k/standard/raw/", "mmlu/standard/raw",
    "gsm8k/few/raw", "gsm8k/standard/none", " gsm8k/standard/raw", "GSM8K/standard/raw",
]  # fmt: skip


@pytest.mark.parametrize("text", INVALID)
def test_an_invalid_task_specification(text: str) -> None:
    """The message says what is allowed."""
    with pytest.raises(UserError, match=rf"evaluate\.tasks: '{text}' is not of the form {FORM}"):
        TaskSpec.parse(text)


def test_all_task_specifications() -> None:
    """Every combination is valid, except the corpus's own questions with synthetic examples."""
    spaces: tuple[ThoughtSpace, ...] = ("latent", "raw")
    for task in PROMPT_FORMS:
        for prompts in ("standard", "synthetic"):
            for space in spaces:
                text = f"{task}/{prompts}/{space}"
                if (task, prompts) == ("questions", "synthetic"):
                    with pytest.raises(UserError, match="questions/standard"):
                        TaskSpec.parse(text)
                    continue
                spec = TaskSpec.parse(text)
                assert (spec.task, spec.prompts, spec.space) == (task, prompts, space)
                assert spec.name == text


def test_only_the_questions_have_a_space_for_plain_text_thoughts() -> None:
    """In raw space the public tasks are asked for a thought anyway."""
    assert TaskSpec.parse("questions/standard/cot").space == "cot"
    with pytest.raises(UserError, match="use 'raw' for 'gsm8k'"):
        TaskSpec.parse("gsm8k/standard/cot")
