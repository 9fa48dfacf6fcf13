"""lm-eval runs this project's tasks: verdicts are its own, every answer is kept, and shares and
errors are those worked out by hand."""

import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from boltlm.errors import UserError
from boltlm.evaluation import downstream
from boltlm.evaluation.downstream import Answer, Asking, Drawing, Spec, accuracy, measures
from boltlm.evaluation.grading import GRADERS
from boltlm.evaluation.prompts import FORMS, encode
from boltlm.evaluation.tasks.loading import parts
from boltlm.records import Question, write_shard
from boltlm.tokens import EOL, POST, PRIOR, SOL, TextCoder
from tests.evaluation import upstream
from tests.evaluation.upstream import Scripted, question


@pytest.fixture(scope="module")
def wide(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return upstream.wide(base_folder, tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize("task", upstream.BENCHMARKS)
def test_verdicts_are_lm_evals(task: str, wide: Path, tmp_path: Path) -> None:
    """The same model on the same questions: theirs and ours call each answer right or wrong alike,
    but where the task's file names the difference; and there they really differ."""
    rows, told = upstream.rows(task), upstream.TOLD[task]
    their = upstream.theirs(task, rows)
    asked = [question(prompt) for one in their.values() for prompt in upstream.requested(one)]
    assert len({*asked}) == len(rows)
    where = upstream.write(tmp_path, task, rows)
    spec, asking = f"{task}/standard/raw", Asking(where=where, tokenizer=wide, answer_tokens=9)
    used: set[str] = set()
    for shift in range(1 if len(rows) > 200 else len(told)):
        said: dict[str, str] = {}
        expected: dict[str, tuple[set[str], set[str]]] = {}
        for key, row in zip(asked, rows, strict=True):
            filled = upstream.words(task, row)
            usable = told if filled.get("n", 0) >= 0 else told[:-1]  # −4 is right where it is -4
            form, we, they = usable[(zlib.crc32(key.encode()) + shift) % len(usable)]
            said[key], expected[key] = form.format(**filled), (we, they)
            used.add(form)
        model = Scripted(lambda prompt, said=said: said[question(prompt)])
        ours: dict[str, dict[str, bool]] = {}
        for one in downstream.run(model, Spec.of(spec), asking):
            ours.setdefault(question(one.prompt), {})[one.grader] = one.correct
        theirs = upstream.verdicts(their, model)
        assert len(ours) == len(theirs) == len(rows)
        for key, (we, they) in expected.items():
            assert ours[key] == {name: name in we for name in GRADERS[task]}, (key, said[key])
            assert theirs[key] == {name: name in they for name in GRADERS[task]}, (key, said[key])
    assert used == {form for form, *_ in told}


ITEMS = [
    {"question": f"How many are {n} and {n}?", "answer": f"They are {2 * n}.\n#### {2 * n}"}
    for n in range(1, 6)
]


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> str:
    return upstream.write(tmp_path_factory.mktemp("items"), "gsm8k", ITEMS)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions as the stage `split` leaves them."""
    folder = tmp_path_factory.mktemp("questions")
    found = [
        Question(question_id="q7", prompt="A dial is at 3. Up 4.", answer="7", latent="3 + 4"),
        Question(question_id="q2", prompt=" A dial is at 9. Down 7.", answer="2"),
    ]
    write_shard(folder / "00000.parquet", Question, found)
    return folder


def documents(spec: str, where: str, folder: Path, **more: Any) -> list[dict[str, Any]]:
    asking = Asking(where=where, tokenizer=folder, answer_tokens=9, **more)
    (task,) = downstream.load(Spec.of(spec), asking)["tasks"].values()
    return list(task.eval_docs)


def test_the_tasks_are_lm_evals_to_load(items: str, pages: Path, tmp_path: Path) -> None:
    """The folder is good for `lm_eval --include_path`, too: four tasks, named by their files, with
    the graders as metrics, and prompts whole where no model's window is told."""
    places = {
        "gsm8k": items,
        "math": upstream.write(tmp_path, "math", upstream.rows("math")),
        "mmlu_stem": upstream.write(tmp_path, "mmlu_stem", upstream.rows("mmlu_stem")),
        "questions": str(pages),
    }
    for task, where in places.items():
        manager = TaskManager(
            include_path=str(downstream.TASKS), include_defaults=False, metadata={"where": where}
        )
        assert manager.all_tasks == sorted(f"boltlm_{name}" for name in FORMS)
        found: Any = manager.load(f"boltlm_{task}")
        (loaded,) = found["tasks"].values()
        config = loaded.config
        assert [one["metric"] for one in config.metric_list] == list(GRADERS[task])
        assert {*loaded.aggregation()} == {*loaded.higher_is_better()} == {*GRADERS[task]}
        assert all(loaded.higher_is_better().values())
        assert FORMS[task].before.strip() in ["", *config.generation_kwargs["until"]]
        docs = list(loaded.eval_docs)
        assert upstream.requested(loaded) == [doc["prompt"] for doc in docs]
        assert {doc["shots"] for doc in docs} == {FORMS[task].shots}


def test_limit_samples_and_shots(items: str, wide: Path) -> None:
    """The first questions, each as often as asked, the samples side by side; zero-shot is the
    question alone, and not counted as lost shots."""
    found = documents("gsm8k/standard/raw", items, wide, limit=2, drawing=Drawing(samples=3))
    assert [(doc["id"], doc["sample"]) for doc in found] == [
        (f"gsm8k-test-0000{n}", sample) for n in range(2) for sample in range(3)
    ]
    assert [doc["prompt"] for doc in found[:3]] == [found[0]["prompt"]] * 3
    assert len(documents("gsm8k/standard/raw", items, wide)) == len(ITEMS)
    for space, end in (("raw", ""), ("latent", f"{SOL}{PRIOR}")):
        bare = documents(f"gsm8k/synthetic/{space}", items, wide, zero_shot=True)[0]
        assert bare["prompt"] == f"Q: How many are 1 and 1?\nA:{end}"
        assert (bare["shots"], bare["lost_shots"]) == (0, 0)


def test_the_corpus_questions(pages: Path, wide: Path) -> None:
    """A page goes on: nothing is put around it but what says whether a latent comes."""
    for space, bare, end in (
        ("latent", False, SOL + PRIOR), ("raw", False, ""), ("raw", True, SOL + EOL),
    ):  # fmt: skip
        found = documents(f"questions/standard/{space}", str(pages), wide, bare=bare)
        wanted = [
            ("q7", f"A dial is at 3. Up 4.{end}", "7"),
            ("q2", f" A dial is at 9. Down 7.{end}", "2"),
        ]
        assert [(doc["id"], doc["prompt"], doc["gold"]) for doc in found] == wanted


@pytest.mark.parametrize("drawing", [Drawing(), Drawing(temperature=0.6, top_k=50, top_p=0.9)])
@pytest.mark.parametrize("space", ["latent", "raw"])
def test_what_the_model_is_asked(space: str, drawing: Drawing, items: str, wide: Path) -> None:
    """Greedy unless a temperature is given; an answer ends at the next question; in latent space
    also where another latent would begin, but not at EoL, behind which the answer stands."""
    model = Scripted(lambda _: "")
    asking = Asking(where=items, tokenizer=wide, answer_tokens=17, drawing=drawing)
    downstream.run(model, Spec.of(f"gsm8k/standard/{space}"), asking)
    drawn = {"do_sample": False}
    if drawing.temperature:
        drawn = {"do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 0.9}
    for prompt, settings in model.asked:
        until = settings.pop("until")
        assert "Q:" in until
        assert EOL not in until
        assert ({SOL, PRIOR, POST} <= {*until}) is (space == "latent")
        assert settings == {"max_gen_toks": 17, **drawn}
        assert prompt.endswith(SOL + PRIOR) is (space == "latent")


def replies(texts: list[str]) -> Scripted:
    """One after the other, whatever is asked."""
    left = iter(texts)
    return Scripted(lambda _: next(left))


@pytest.mark.parametrize("space", ["latent", "raw"])
def test_one_answer_a_grader_and_sample(space: str, items: str, wide: Path) -> None:
    """The table shows what was asked, written and read. An answer that stands in the latent only,
    or in one that never ended, is none."""
    texts = [
        f"1 + 1 is 2.{EOL} The answer is 2.",
        f"The answer is 2.{EOL} I cannot tell.",
        "The answer is 2.",
        f"So 4.{EOL} It is 4",
    ]
    if space == "raw":
        texts = ["The answer is 2.", "I cannot tell.", "", "It is 4"]
    spec, drawing = Spec.of(f"gsm8k/synthetic/{space}"), Drawing(samples=2, temperature=1.0)
    asking = Asking(where=items, tokenizer=wide, answer_tokens=9, drawing=drawing, limit=2)
    found = downstream.run(replies(texts), spec, asking)
    graders = GRADERS["gsm8k"]
    assert [(a.question_id[-1], a.sample, a.grader) for a in found] == [
        (str(n), sample, grader) for n in range(2) for sample in range(2) for grader in graders
    ]
    assert [a.completion for a in found] == [text for text in texts for _ in graders]
    assert [a.correct for a in found] == [True, True, False, False, False, False, True, False]
    assert [a.extracted for a in found] == ["2", "2", None, None, None, None, "4", None]
    thoughts = ["1 + 1 is 2.", "The answer is 2.", "The answer is 2.", "So 4."]
    wanted = thoughts if space == "latent" else [None] * 4
    assert [a.thought for a in found] == [one for one in wanted for _ in graders]
    prompts = {doc["id"]: doc["prompt"] for doc in documents(spec.name, items, wide)}
    for answer in found:
        assert (answer.task, answer.prompts, answer.space) == ("gsm8k", "synthetic", space)
        assert (answer.subject, answer.shots, answer.lost_shots) == ("", 8, 0)
        assert answer.prompt == prompts[answer.question_id]
        assert answer.gold == ITEMS[int(answer.question_id[-1])]["answer"]
    names = dict.fromkeys(answer.measure for answer in found)
    assert list(names) == [spec.name, f"{spec.name}/strict"]


def test_the_parts_of_what_was_written() -> None:
    """Only behind the first EoL stands an answer; raw text is all answer."""
    assert parts(f"a{EOL} b{EOL}c", "latent") == ("a", f" b{EOL}c")
    assert parts(EOL, "latent") == ("", "")
    assert parts("a", "latent") == ("a", None)
    assert parts(f"a{EOL}b", "raw") == (None, f"a{EOL}b")


def test_the_shares_are_lm_evals_and_worked_out_by_hand(items: str, wide: Path) -> None:
    """Three samples of each of five questions: shares 1, 2/3, 1/3, 0, 0. The error is over
    questions, since samples of one are not independent; and lm-eval's own mean is the same."""
    right = [(1, 1, 1), (1, 0, 1), (0, 1, 0), (0, 0, 0), (0, 0, 0)]
    texts = [f"It is {2 * n if one else 99}." for n, of in enumerate(right, 1) for one in of]
    spec = Spec.of("gsm8k/standard/raw")
    drawing = Drawing(samples=3, temperature=1.0)
    asking = Asking(where=items, tokenizer=wide, answer_tokens=9, drawing=drawing)
    answers = downstream.run(replies(texts), spec, asking)
    found = measures(answers, "tests")
    shares = [1, 2 / 3, 1 / 3, 0, 0]
    spread = sum((share - 0.4) ** 2 for share in shares) / 4
    assert found == {
        "gsm8k/standard/raw/accuracy": pytest.approx(0.4),
        "gsm8k/standard/raw/accuracy_se": pytest.approx(math.sqrt(spread / 5)),
        "gsm8k/standard/raw/strict/accuracy": 0,
        "gsm8k/standard/raw/strict/accuracy_se": 0,
        "gsm8k/standard/raw/questions": 5,
        "gsm8k/standard/raw/shots": 8,
        "gsm8k/standard/raw/lost_shots_fraction": 0,
    }
    theirs: Any = evaluate(replies(texts), downstream.load(spec, asking), bootstrap_iters=0)
    (means,) = theirs["results"].values()
    assert means["flexible,none"] == pytest.approx(0.4)
    assert means["strict,none"] == 0


def answer(question_id: str, correct: bool, **more: Any) -> Answer:
    return Answer(
        **{
            "task": "gsm8k", "prompts": "standard", "space": "raw", "subject": "", "sample": 0,
            "shots": 8, "lost_shots": 0, "prompt": "Q", "completion": "A", "thought": None,
            "gold": "1", "grader": "flexible", "extracted": None,
            "question_id": question_id, "correct": correct, **more,
        }
    )  # fmt: skip


def test_accuracy_and_its_error() -> None:
    """Questions with unlike many samples count alike; one question alone has no error."""
    found = [answer("a", True), answer("a", False), answer("b", True), answer("c", False)]
    mean, error = accuracy(found)
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(np.std([0.5, 1, 0], ddof=1) / math.sqrt(3))
    mean, error = accuracy(found[:2])
    assert mean == 0.5
    assert math.isnan(error)


def test_short_prompts_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A share under lost shots is another measure: it is in the metrics and on standard error, as
    are questions that were not asked and thoughts that never ended. Each sample counts once, not
    once a grader."""
    name, whole = "gsm8k/standard/latent", {"space": "latent", "completion": f"t{EOL} 1"}
    found = [
        answer("a", True, **whole),
        answer("b", True, **whole | {"shots": 5, "lost_shots": 3}),
        answer("c", False, **whole | {"shots": -1, "lost_shots": 8, "completion": ""}),
        answer("d", False, **whole | {"completion": "no end"}),
        answer("e", False, **whole | {"completion": "The answer is 1."}),
    ]
    found += [replace(one, grader="strict", correct=False) for one in found]
    measured = measures(found, "evaluate tiny")
    assert measured[f"{name}/accuracy"] == 2 / 5
    assert measured[f"{name}/strict/accuracy"] == 0
    assert measured[f"{name}/questions"] == 5
    assert measured[f"{name}/shots"] == (8 + 5 + 0 + 8 + 8) / 5
    assert measured[f"{name}/lost_shots_fraction"] == 2 / 5
    assert measured[f"{name}/unasked_fraction"] == 1 / 5
    assert measured[f"{name}/unfinished_fraction"] == 2 / 4
    told = capsys.readouterr()
    assert told.out == ""
    assert f"evaluate tiny: 2 of 5 prompts of {name} lost shots" in told.err
    assert f"evaluate tiny: 1 questions of {name} are beyond the window" in told.err
    measures([answer("a", True), answer("b", False)], "evaluate tiny")
    assert capsys.readouterr().err == ""


def test_a_question_beyond_the_window(base_folder: Path, tmp_path: Path) -> None:
    """It has no prompt and counts as wrong, all its shots as lost; the others are asked with the
    shots that fit."""
    rows = [{"question": "word " * n, "answer": "#### 1"} for n in (1, 1000)]
    where = upstream.write(tmp_path, "gsm8k", rows)
    asking = Asking(where=where, tokenizer=base_folder, answer_tokens=9)
    model = Scripted(lambda prompt: "The answer is 1." if prompt else "")
    short, *_, long = downstream.run(model, Spec.of("gsm8k/standard/raw"), asking)
    assert (long.prompt, long.shots, long.lost_shots, long.correct) == ("", -1, 8, False)
    assert short.correct
    assert short.shots + short.lost_shots == 8
    coder = TextCoder(base_folder)
    assert 1 + len(encode(coder, short.prompt)) + 9 <= coder.window


FORM = r"\(gsm8k\|math\|mmlu_stem\|questions\)/\(standard\|synthetic\)/\(latent\|raw\)"


BAD = [
    "", "gsm8k", "gsm8k/standard", "gsm8k/raw/standard", "gsm8k/standard/raw/", "mmlu/standard/raw",
    "gsm8k/few/raw", "gsm8k/standard/none", " gsm8k/standard/raw", "GSM8K/standard/raw",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_what_names_no_task_is_told(text: str) -> None:
    """The message says what can be written there."""
    with pytest.raises(UserError, match=rf"evaluate\.tasks: '{text}' is not of the form {FORM}"):
        Spec.of(text)


def test_the_names_of_tasks() -> None:
    """Every combination is one, but the corpus's own questions with shots that nobody wrote."""
    for task in FORMS:
        for prompts in ("standard", "synthetic"):
            for space in ("latent", "raw"):
                text = f"{task}/{prompts}/{space}"
                if (task, prompts) == ("questions", "synthetic"):
                    with pytest.raises(UserError, match="questions/standard"):
                        Spec.of(text)
                    continue
                spec = Spec.of(text)
                assert (spec.task, spec.prompts, spec.space) == (task, prompts, space)
                assert spec.name == text
