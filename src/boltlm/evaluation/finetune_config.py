"""Settings of the stage `finetune` (docs/method.md, 6.3)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from boltlm.corpus.benchmarks import BenchmarkName
from boltlm.errors import UserError
from boltlm.estep.config import SamplingConfig
from boltlm.evaluation.task_spec import Backend, TaskName, TaskSpec, ThoughtSpace, require_benchmark
from boltlm.param_types import (
    EntryName,
    EntryPath,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFraction,
    PositiveInt,
    ProperFraction,
    Text,
)
from boltlm.params import from_key
from boltlm.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneRun:
    """Params entry `finetune.runs.<name>`.

    `corpus` holds documents that end in an answer. `data` is the folder in data/ with their
    thoughts: teacher/<name> of a teacher whose task is `solve`, or split/<corpus>, whose documents
    carry thoughts themselves. The fine-tuned model is evaluated zero-shot on `task`; `space` says
    where it writes its thoughts.
    """

    model: Annotated[str, EntryName("models", "base")]
    corpus: Annotated[str, EntryName("corpora")]
    data: Annotated[str, EntryPath(teacher="teachers", split="corpora")]
    task: TaskName
    space: ThoughtSpace


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneSettings:
    """Settings of the stage `finetune` for the run `name`.

    The fraction `heldout_fraction` of the documents is held out and scored instead of trained on.
    Each of `seeds` trainings answers every question `samples` times; `temperature` 0 is greedy
    decoding, `top_k` 0 is no truncation. `workers` trainings run at once, several of them in
    processes of their own, each on a GPU where there are GPUs; it changes no result.
    """

    name: str
    seed: NonNegativeInt
    sampling: SamplingConfig
    benchmarks: Mapping[BenchmarkName, Text]
    run: FinetuneRun = from_key("finetune.runs.{name}")
    epochs: PositiveInt = from_key("finetune.epochs")
    heldout_fraction: ProperFraction = from_key("finetune.heldout_fraction")
    seeds: PositiveInt = from_key("finetune.seeds")
    workers: PositiveInt = from_key("finetune.workers")
    samples: PositiveInt = from_key("finetune.samples")
    temperature: NonNegativeFloat = from_key("finetune.temperature")
    top_k: NonNegativeInt = from_key("finetune.top_k")
    top_p: PositiveFraction = from_key("finetune.top_p")
    max_thought_tokens: PositiveInt = from_key("finetune.max_thought_tokens")
    max_answer_tokens: PositiveInt = from_key("finetune.max_answer_tokens")
    train: TrainConfig = from_key("finetune.train")
    backend: Backend = from_key("evaluate.backend")
    batch_size: PositiveInt = from_key("evaluate.batch_size")
    limit: PositiveInt | None = from_key("evaluate.limit")

    def __post_init__(self) -> None:
        require_benchmark(f"finetune.runs.{self.name}.task", self.run.task, self.benchmarks)
        if self.task_spec.name == "questions/standard/raw":
            raise UserError(
                f"finetune.runs.{self.name}.space is 'raw', which for 'questions' means without a"
                " thought; use 'cot' for a thought in plain text"
            )

    @property
    def task_spec(self) -> TaskSpec:
        """The task that the fine-tuned model is evaluated on."""
        return TaskSpec(task=self.run.task, prompts="standard", space=self.run.space)
