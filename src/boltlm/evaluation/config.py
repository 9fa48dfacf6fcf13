"""Settings of the stage `evaluate` (docs/method.md, sections 5 and 6)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from boltlm.corpus.benchmarks import BenchmarkName
from boltlm.errors import UserError
from boltlm.estep.config import DrawSettings
from boltlm.evaluation.task_spec import Backend, TaskSpec, require_benchmark
from boltlm.params import EntryName, PositiveInt, from_key
from boltlm.sequences.layouts import SequenceFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Params section `evaluate`.

    `corpus` and `extra_corpora` are the held-out corpora. `k_samples` lists each K whose bound is
    reported; the largest of them is the number of latents sampled per chunk. `tasks` lists task
    specifications (see TaskSpec). `batch_size` is the number of prompts in a batch, and `limit`
    restricts every task to its first questions (null: all). The thought and the answer after it
    have length limits in tokens.
    """

    corpus: Annotated[str, EntryName("corpora")]
    extra_corpora: tuple[Annotated[str, EntryName("corpora")], ...]
    k_samples: tuple[PositiveInt, ...]
    tasks: tuple[str, ...]
    backend: Backend
    batch_size: PositiveInt
    max_thought_tokens: PositiveInt
    max_answer_tokens: PositiveInt
    limit: PositiveInt | None

    def __post_init__(self) -> None:
        if not self.k_samples:
            raise UserError("k_samples must list one number or more, found none")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSettings(DrawSettings):
    """Settings of the stage `evaluate` for the model `name`."""

    name: str
    evaluate: EvaluateConfig
    benchmarks: Mapping[BenchmarkName, str]
    format: SequenceFormat = from_key("models.{name}.format")

    def __post_init__(self) -> None:
        for task in self.evaluate.tasks:
            require_benchmark("evaluate.tasks", TaskSpec.parse(task).task, self.benchmarks)

    @property
    def has_latents(self) -> bool:
        """Whether the model was trained to write latents."""
        return self.format == "latent"

    @property
    def task_specs(self) -> tuple[TaskSpec, ...]:
        """The tasks that this model can be evaluated on: raw space only, if it has no latents."""
        specs = map(TaskSpec.parse, self.evaluate.tasks)
        return tuple(spec for spec in specs if self.has_latents or spec.space == "raw")
