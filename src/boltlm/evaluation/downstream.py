"""Questions with answers that can be graded: the tasks of the folder `tasks`, run by lm-eval
(docs/method.md, section 6)."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from boltlm.evaluation.grading import GRADERS
from boltlm.evaluation.task_spec import TaskSpec
from boltlm.evaluation.tasks.loading import grade_completion, split_completion
from boltlm.tokens import EOL, POST, PRIOR, SOL

TASK_DIR = Path(__file__).with_name("tasks")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskAnswer:
    """A model's completion for a question, and the verdict of one grader.

    `thought` is the text before EoL in latent space, None in raw space. `shots` is the number of
    few-shot examples in the prompt, or −1 where not even the question fits into the context window,
    in which case the model is not asked. `lost_shots` counts the examples that did not fit.
    """

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
    def metric_prefix(self) -> str:
        """The prefix of the metrics that the answer counts for: the task specification, followed by
        the grader unless it is the task's first one."""
        prefix = f"{self.task}/{self.prompts}/{self.space}"
        return prefix if self.grader == GRADERS[self.task][0] else f"{prefix}/{self.grader}"


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
    `no_latent` is described at `render_prompt`; `zero_shot` leaves out the few-shot examples;
    `limit` restricts the task to its first questions (None: all).
    """

    data_path: str
    tokenizer: Path
    max_answer_tokens: int
    split: str = "test"
    decoding: DecodingConfig = DecodingConfig()
    no_latent: bool = False
    zero_shot: bool = False
    limit: int | None = None


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
        "split": options.split,
        "model_folder": str(options.tokenizer),
        "max_answer_tokens": options.max_answer_tokens,
        "samples": options.decoding.samples,
        "no_latent": options.no_latent,
        "zero_shot": options.zero_shot,
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
            question_id=doc["id"],
            sample=doc["sample"],
            shots=doc["shots"],
            lost_shots=doc["lost_shots"],
            prompt=doc["prompt"],
            completion=completion,
            thought=split_completion(completion, spec.space)[0],
            gold=doc["gold"],
            grader=grader,
            extracted=verdict.extracted,
            correct=verdict.correct,
        )


def task_metrics(answers: Sequence[TaskAnswer], label: str) -> dict[str, float]:
    """The metrics of one task: the accuracy by each grader with its standard error over questions,
    and what was lost.

    Per prompt: `shots`, the mean number of few-shot examples; `lost_shots_fraction`, the fraction
    of prompts with fewer examples than the task has; `unasked_fraction`, the fraction of questions
    that do not fit into the context window and count as wrong; `invalid_fraction`, the fraction of
    thoughts without EoL. Lost examples and questions are also reported on standard error, after
    `label`.
    """
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(answer.metric_prefix for answer in answers):
        graded = [answer for answer in answers if answer.metric_prefix == name]
        metrics[f"{name}/accuracy"], metrics[f"{name}/accuracy_se"] = mean_accuracy(graded)
    name = next(iter(metrics)).removesuffix("/accuracy")
    # Each completion once, not once for each grader.
    completions = [answer for answer in answers if answer.grader == answers[0].grader]
    metrics[f"{name}/questions"] = len({answer.question_id for answer in completions})
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


def _warn(message: str) -> None:
    print(message, file=sys.stderr)


def mean_accuracy(answers: Sequence[TaskAnswer]) -> tuple[float, float]:
    """The mean over questions of the fraction of correct samples, and its standard error over
    questions (NaN for a single one)."""
    verdicts_by_question: dict[str, list[bool]] = {}
    for answer in answers:
        verdicts_by_question.setdefault(answer.question_id, []).append(answer.correct)
    fractions = np.array([np.mean(verdicts) for verdicts in verdicts_by_question.values()])
    if len(fractions) < 2:
        return float(fractions.mean()), float("nan")
    return float(fractions.mean()), float(fractions.std(ddof=1) / np.sqrt(len(fractions)))
