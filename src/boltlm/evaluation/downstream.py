"""Questions with answers that can be graded: the tasks of the folder `tasks`, run by lm-eval."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pyarrow as pa

from boltlm.errors import UserError
from boltlm.evaluation.grading import GRADERS
from boltlm.evaluation.prompts import FORMS, Prompts, Space, shots
from boltlm.evaluation.tasks.loading import parts, verdicts
from boltlm.tokens import EOL, POST, PRIOR, SOL

TASKS = Path(__file__).with_name("tasks")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model wrote for a question, and one grader's verdict. `thought`: in latent space, what
    stands before EoL. `shots`: those that the prompt holds, −1 where the window had no room for the
    question itself, which was then not asked; `lost_shots`: those that it had no room for."""

    schema: ClassVar[pa.Schema] = pa.schema(
        {
            "task": pa.string(),
            "prompts": pa.string(),
            "space": pa.string(),
            "subject": pa.string(),
            "question_id": pa.string(),
            "sample": pa.int32(),
            "shots": pa.int32(),
            "lost_shots": pa.int32(),
            "prompt": pa.string(),
            "completion": pa.string(),
            "thought": pa.string(),
            "gold": pa.string(),
            "grader": pa.string(),
            "extracted": pa.string(),
            "correct": pa.bool_(),
        }
    )
    task: str
    prompts: str
    space: str
    subject: str
    question_id: str
    sample: int
    shots: int
    lost_shots: int
    prompt: str
    completion: str
    thought: str | None
    gold: str
    grader: str
    extracted: str | None
    correct: bool

    @property
    def measure(self) -> str:
        """What it counts for; a task's first grader needs no name."""
        place = f"{self.task}/{self.prompts}/{self.space}"
        return place if self.grader == GRADERS[self.task][0] else f"{place}/{self.grader}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """One entry of `evaluate.tasks`, `<task>/<prompts>/<space>`."""

    task: str
    prompts: Prompts
    space: Space

    @classmethod
    def of(cls, text: str) -> "Spec":
        """Raises UserError for what names no task."""
        allowed = tuple(FORMS), get_args(Prompts), get_args(Space)
        parts = text.split("/")
        if len(parts) != 3 or not all(p in a for p, a in zip(parts, allowed, strict=True)):
            form = "/".join(f"({'|'.join(one)})" for one in allowed)
            raise UserError(f"evaluate.tasks: '{text}' is not of the form {form}")
        task, name, space = parts
        shots(task, name, "abstract_algebra")  # pyright: ignore[reportArgumentType]
        return cls(task=task, prompts=name, space=space)  # pyright: ignore[reportArgumentType]

    @property
    def name(self) -> str:
        return f"{self.task}/{self.prompts}/{self.space}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """How answers are drawn: greedily, or by temperature, top_k and top_p, `samples` a question."""

    samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def settings(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {"do_sample": False}
        chosen = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {"do_sample": True, **chosen}


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """How a task is asked. `where`: its data, a file or a hub name; `split`: which of the hub's;
    `tokenizer`: the model's folder; `answer_tokens`: the most that is drawn; `bare`: a model in raw
    space is told by the empty pair that no latent comes; `zero_shot`: without shots; `limit`:
    the first so many questions."""

    where: str
    tokenizer: Path
    answer_tokens: int
    split: str = "test"
    drawing: Drawing = Drawing()
    bare: bool = False
    zero_shot: bool = False
    limit: int | None = None


def run(model: Any, spec: Spec, asking: Asking) -> list[Answer]:
    """Ask a model of lm-eval all questions: one Answer for each grader of each sample."""
    from lm_eval.evaluator import evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found: Any = evaluate(model, load(spec, asking), log_samples=True, bootstrap_iters=0)
    (samples,) = found["samples"].values()
    return [answer for sample in samples for answer in _answers(sample, spec)]


def load(spec: Spec, asking: Asking) -> Any:
    """lm-eval's task for a spec."""
    from lm_eval.tasks import TaskManager

    chosen = {
        "prompts": spec.prompts,
        "space": spec.space,
        "where": asking.where,
        "split": asking.split,
        "model": str(asking.tokenizer),
        "answer_tokens": asking.answer_tokens,
        "samples": asking.drawing.samples,
        "bare": asking.bare,
        "zero_shot": asking.zero_shot,
        "limit": asking.limit,
    }
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=chosen)
    found: Any = manager.load(f"boltlm_{spec.task}")
    (task,) = found["tasks"].values()
    drawn = {"max_gen_toks": asking.answer_tokens, **asking.drawing.settings()}
    if spec.space == "latent":
        drawn["until"] = [*task.config.generation_kwargs["until"], SOL, PRIOR, POST]
    task.set_config("generation_kwargs", drawn, update=True)
    return found


def _answers(sample: Mapping[str, Any], spec: Spec) -> Iterator[Answer]:
    doc, completion = sample["doc"], sample["resps"][0][0]
    for grader, verdict in verdicts(doc, completion).items():
        yield Answer(
            task=spec.task,
            prompts=spec.prompts,
            space=spec.space,
            subject=doc["subject"],
            question_id=doc["id"],
            sample=doc["sample"],
            shots=doc["shots"],
            lost_shots=doc["lost_shots"],
            prompt=doc["prompt"],
            completion=completion,
            thought=parts(completion, spec.space)[0],
            gold=doc["gold"],
            grader=grader,
            extracted=verdict.extracted,
            correct=verdict.correct,
        )


def measures(answers: Sequence[Answer], what: str) -> dict[str, float]:
    """Of one task: accuracy by each grader with its standard error over questions, and what became
    of the prompts; lost shots are also told on standard error."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(answer.measure for answer in answers):
        mine = [answer for answer in answers if answer.measure == name]
        found[f"{name}/accuracy"], found[f"{name}/accuracy_se"] = accuracy(mine)
    name = next(iter(found)).removesuffix("/accuracy")
    asked = [answer for answer in answers if answer.grader == answers[0].grader]
    found[f"{name}/questions"] = len({answer.question_id for answer in asked})
    if any(answer.shots + answer.lost_shots > 0 for answer in asked):
        lost = sum(answer.lost_shots > 0 for answer in asked)
        found[f"{name}/shots"] = float(np.mean([max(answer.shots, 0) for answer in asked]))
        found[f"{name}/lost_shots_fraction"] = lost / len(asked)
        if lost:
            said = f"{lost} of {len(asked)} prompts of {name} lost shots: the window is too short"
            print(f"{what}: {said}", file=sys.stderr)
    if unasked := sum(answer.shots < 0 for answer in asked):
        found[f"{name}/unasked_fraction"] = unasked / len(asked)
        print(f"{what}: {unasked} questions of {name} are beyond the window", file=sys.stderr)
    if answers[0].space == "latent":
        ended = [EOL in answer.completion for answer in asked if answer.shots >= 0]
        found[f"{name}/unfinished_fraction"] = 1 - sum(ended) / max(len(ended), 1)
    return found


def accuracy(answers: Sequence[Answer]) -> tuple[float, float]:
    """Mean over questions of the share of correct samples, and its standard error over them."""
    of_question: dict[str, list[bool]] = {}
    for answer in answers:
        of_question.setdefault(answer.question_id, []).append(answer.correct)
    shares = np.array([np.mean(verdicts) for verdicts in of_question.values()])
    if len(shares) < 2:
        return float(shares.mean()), float("nan")
    return float(shares.mean()), float(shares.std(ddof=1) / np.sqrt(len(shares)))
