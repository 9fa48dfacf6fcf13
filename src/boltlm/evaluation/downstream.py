"""Questions with answers that can be graded: the tasks of the folder `tasks`, run by lm-eval
(docs/method.md, section 6)."""

import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from boltlm.evaluation.clustered_errors import RatioEstimate, mean_estimate
from boltlm.evaluation.grading import GRADERS
from boltlm.evaluation.task_spec import TaskSpec
from boltlm.evaluation.tasks.loading import grade_completion, split_completion
from boltlm.tokens import EOL, POST, PRIOR, SOL

GROUPS: tuple[Literal["subject", "level"], ...] = ("subject", "level")
TASK_DIR = Path(__file__).with_name("tasks")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskAnswer:
    """A model's completion for a question, and the verdict of one grader.

    `thought` is the text before EoL in latent space, that before the answer in the space `cot`,
    and None in raw space. `level` is the difficulty of a problem of MATH. `cluster` names what
    makes questions dependent, `cue` is the position in `evaluate.cues` from 1 (space `cot`; 0
    elsewhere). `shots` is the number of few-shot examples in the prompt, or −1 where not even the
    question fits into the context window, in which case the model is not asked. `lost_shots` counts
    the examples that did not fit.
    """

    schema: ClassVar[pa.Schema] = pa.schema(
        {
            "task": pa.string(),
            "prompts": pa.string(),
            "space": pa.string(),
            "subject": pa.string(),
            "level": pa.string(),
            "question_id": pa.string(),
            "cluster": pa.string(),
            "cue": pa.int32(),
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
    level: str
    question_id: str
    cluster: str
    cue: int
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
    def spec_name(self) -> str:
        """The task specification, `<task>/<prompt set>/<thought space>`."""
        return f"{self.task}/{self.prompts}/{self.space}"

    @property
    def metric_prefix(self) -> str:
        """The prefix of the accuracy that the answer counts for: the task specification, followed
        by `cue<position>` if it has cues, and by the grader unless it is the task's first one."""
        cue = f"/cue{self.cue}" if self.cue else ""
        grader = "" if self.grader == GRADERS[self.task][0] else f"/{self.grader}"
        return f"{self.spec_name}{cue}{grader}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodingConfig:
    """How answers are generated, `samples` for each question: greedily where `temperature` is 0,
    else by sampling with temperature, top-k (0: all tokens) and top-p."""

    samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def generation_kwargs(self) -> dict[str, Any]:
        """The arguments of Hugging Face's `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        kwargs = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {"do_sample": True, **kwargs}


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskOptions:
    """How a task is run.

    `data_path` is a file, a folder of questions or a hub name, and `split` that of the hub's data
    set. `tokenizer` is the model's folder, `max_answer_tokens` the length limit of a completion.
    `no_latent`, `zero_shot` and `cues` are described at `load_docs`; `limit` restricts the task to
    its first questions (None: all). `fewshot` is the file of the synthetic examples, which
    zero-shot prompts do without.
    """

    data_path: str
    tokenizer: Path
    max_answer_tokens: int
    split: str = "test"
    decoding: DecodingConfig = DecodingConfig()
    no_latent: bool = False
    zero_shot: bool = False
    cues: tuple[str, ...] = ("",)
    limit: int | None = None
    fewshot: Path | None = None


def run_task(model: Any, spec: TaskSpec, options: TaskOptions) -> list[TaskAnswer]:
    """Ask a model of lm-eval all questions: one answer for each grader of each sample."""
    from lm_eval.evaluator import evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    results: Any = evaluate(model, load_task(spec, options), log_samples=True, bootstrap_iters=0)
    (samples,) = results["samples"].values()
    return [answer for sample in samples for answer in _answers(sample, spec)]


def load_task(spec: TaskSpec, options: TaskOptions) -> Any:
    """lm-eval's task dictionary for a specification."""
    from lm_eval.tasks import TaskManager

    load_arguments = {
        "prompts": spec.prompts,
        "space": spec.space,
        "data_path": options.data_path,
        "fewshot_path": str(options.fewshot or ""),
        "split": options.split,
        "model_folder": str(options.tokenizer),
        "max_answer_tokens": options.max_answer_tokens,
        "samples": options.decoding.samples,
        "no_latent": options.no_latent,
        "zero_shot": options.zero_shot,
        "cues": list(options.cues),
        "limit": options.limit,
    }
    manager = TaskManager(
        include_path=str(TASK_DIR), include_defaults=False, metadata=load_arguments
    )
    loaded: Any = manager.load(f"boltlm_{spec.task}")
    (task,) = loaded["tasks"].values()
    kwargs = {"max_gen_toks": options.max_answer_tokens, **options.decoding.generation_kwargs}
    if spec.space == "latent":
        kwargs["until"] = [*task.config.generation_kwargs["until"], SOL, PRIOR, POST]
    task.set_config("generation_kwargs", kwargs, update=True)
    return loaded


def _answers(sample: Mapping[str, Any], spec: TaskSpec) -> Iterator[TaskAnswer]:
    doc, completion = sample["doc"], sample["resps"][0][0]
    for grader, verdict in grade_completion(doc, completion).items():
        yield TaskAnswer(
            task=spec.task,
            prompts=spec.prompts,
            space=spec.space,
            subject=doc["subject"],
            level=doc["level"],
            question_id=doc["id"],
            cluster=doc["cluster"],
            cue=doc["cue"],
            sample=doc["sample"],
            shots=doc["shots"],
            lost_shots=doc["lost_shots"],
            prompt=doc["prompt"],
            completion=completion,
            thought=split_completion(completion, spec.space, doc["gold"])[0],
            gold=doc["gold"],
            grader=grader,
            extracted=verdict.extracted,
            correct=verdict.correct,
        )


def task_metrics(answers: Sequence[TaskAnswer], label: str) -> dict[str, float]:
    """The metrics of one task: the accuracy by each grader with its standard error, the numbers of
    questions and of their clusters, what was lost, and the accuracy on each subject and level.

    A task with cues has an accuracy for each, and the best of these is its own; `best_cue` is the
    position of that cue. Per prompt: `shots`, the mean number of few-shot examples;
    `lost_shots_fraction`, the fraction of prompts with fewer examples than the task has;
    `unasked_fraction`, the fraction of questions that do not fit into the context window and count
    as wrong; `invalid_fraction`, the fraction of thoughts without EoL. Lost examples and questions
    are also reported on standard error, after `label`.
    """
    metrics: dict[str, float] = {}
    for prefix in dict.fromkeys(answer.metric_prefix for answer in answers):
        graded = [answer for answer in answers if answer.metric_prefix == prefix]
        accuracy = mean_accuracy(graded)
        metrics[f"{prefix}/accuracy"] = accuracy.value
        metrics[f"{prefix}/accuracy_se"] = accuracy.standard_error
    name = answers[0].spec_name
    if cues := dict.fromkeys(answer.cue for answer in answers if answer.cue):
        best = max(cues, key=lambda cue: metrics[f"{name}/cue{cue}/accuracy"])
        metrics[f"{name}/best_cue"] = best
        for metric in ("accuracy", "accuracy_se"):
            metrics[f"{name}/{metric}"] = metrics[f"{name}/cue{best}/{metric}"]
        answers = [answer for answer in answers if answer.cue == best]
    # Each completion once, not once for each grader.
    completions = [answer for answer in answers if answer.grader == answers[0].grader]
    for group in GROUPS:
        metrics |= _group_metrics(completions, name, group)
    metrics[f"{name}/questions"] = len({answer.question_id for answer in completions})
    metrics[f"{name}/clusters"] = len({answer.cluster for answer in completions})
    if any(answer.shots + answer.lost_shots > 0 for answer in completions):
        num_lost = sum(answer.lost_shots > 0 for answer in completions)
        metrics[f"{name}/shots"] = float(np.mean([max(answer.shots, 0) for answer in completions]))
        metrics[f"{name}/lost_shots_fraction"] = num_lost / len(completions)
        if num_lost:
            _warn(
                f"{label}: {num_lost} of {len(completions)} prompts of {name} lost few-shot"
                " examples, because the context window is too short"
            )
    if num_unasked := sum(answer.shots < 0 for answer in completions):
        metrics[f"{name}/unasked_fraction"] = num_unasked / len(completions)
        _warn(
            f"{label}: {num_unasked} of {len(completions)} prompts of {name} do not fit into the"
            " context window"
        )
    if answers[0].space == "latent":
        ended = [EOL in answer.completion for answer in completions if answer.shots >= 0]
        metrics[f"{name}/invalid_fraction"] = 1 - sum(ended) / max(len(ended), 1)
    return metrics


def _group_metrics(
    completions: Sequence[TaskAnswer], name: str, group: Literal["subject", "level"]
) -> dict[str, float]:
    """The accuracy on each subject or level, and its number of questions, where there are
    several."""
    answers_by_group: dict[str, list[TaskAnswer]] = defaultdict(list)
    for answer in completions:
        answers_by_group[getattr(answer, group)].append(answer)
    metrics: dict[str, float] = {}
    if len(answers_by_group) > 1:
        for value, answers in sorted(answers_by_group.items()):
            accuracy, key = mean_accuracy(answers), f"{name}/accuracy_by_{group}/{value}"
            metrics |= {key: accuracy.value, f"{key}_se": accuracy.standard_error}
            questions = {answer.question_id for answer in answers}
            metrics[f"{name}/questions_by_{group}/{value}"] = len(questions)
    return metrics


def _warn(message: str) -> None:
    print(message, file=sys.stderr)


def mean_accuracy(answers: Sequence[TaskAnswer]) -> RatioEstimate:
    """The mean over questions of the fraction of correct samples, with the error of eq. (9)."""
    verdicts_by_question: dict[str, list[bool]] = {}
    for answer in answers:
        verdicts_by_question.setdefault(answer.question_id, []).append(answer.correct)
    fractions = np.array([np.mean(verdicts) for verdicts in verdicts_by_question.values()])
    clusters = {answer.question_id: answer.cluster for answer in answers}
    return mean_estimate(fractions, [clusters[question] for question in verdicts_by_question])
