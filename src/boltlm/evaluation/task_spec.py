"""How a task is named in params.yaml: `<task>/<prompt set>/<thought space>`."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from boltlm.errors import UserError

TaskName = Literal["gsm8k", "math", "mmlu_stem", "questions"]
PromptSet = Literal["standard", "synthetic"]
ThoughtSpace = Literal["latent", "raw", "cot"]
Backend = Literal["hf", "vllm"]  # of lm-eval
# The prompt sets that a task does not have, and what to use instead.
MISSING_PROMPT_SETS: dict[tuple[TaskName, PromptSet], str] = {
    ("questions", "synthetic"): (
        "the corpus's own questions have no few-shot examples; use questions/standard instead of"
        " questions/synthetic"
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSpec:
    """A task, the set of few-shot examples in its prompts, and where the model writes its thought:
    between special tokens (`latent`) or as plain text (`raw`). For `questions`, `raw` is an answer
    without a thought, and `cot` a thought as plain text. See docs/method.md, 6.1 and 6.2.

    Raises UserError for a combination that does not exist."""

    task: TaskName
    prompts: PromptSet
    space: ThoughtSpace

    def __post_init__(self) -> None:
        if message := MISSING_PROMPT_SETS.get((self.task, self.prompts)):
            raise UserError(f"evaluate.tasks: {message}")
        if self.space == "cot" and self.task != "questions":
            raise UserError(
                f"the space 'cot' is for the task 'questions'; use 'raw' for '{self.task}', where"
                " the thought is plain text too"
            )

    @classmethod
    def parse(cls, text: str) -> "TaskSpec":
        """An entry of `evaluate.tasks`. Raises UserError where it does not name a task."""
        allowed = get_args(TaskName), get_args(PromptSet), get_args(ThoughtSpace)
        parts = text.split("/")
        if len(parts) != 3 or not all(p in a for p, a in zip(parts, allowed, strict=True)):
            form = "/".join(f"({'|'.join(names)})" for names in allowed)
            raise UserError(f"evaluate.tasks: '{text}' is not of the form {form}")
        task, prompts, space = parts
        return cls(task=task, prompts=prompts, space=space)  # pyright: ignore[reportArgumentType]

    @property
    def name(self) -> str:
        """`<task>/<prompt set>/<thought space>`, the prefix of the task's metrics."""
        return f"{self.task}/{self.prompts}/{self.space}"


def require_benchmark(key: str, task: TaskName, benchmarks: Collection[str]) -> None:
    """Raises UserError where `task`, named at `key`, is public and is not among the benchmarks."""
    if task != "questions" and task not in benchmarks:
        raise UserError(
            f"{key} names the task '{task}', but there is no key benchmarks.{task}; give it a file"
            " or a Hugging Face hub name"
        )
