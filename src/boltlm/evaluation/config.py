"""Settings of the stages `evaluate` and `curves` (docs/method.md, sections 5 and 6)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated

from boltlm.corpus.benchmarks import BenchmarkName
from boltlm.errors import UserError
from boltlm.estep.config import DrawSettings
from boltlm.evaluation.task_spec import Backend, TaskSpec, require_benchmark
from boltlm.param_types import Distinct, EntryName, NonEmpty, Overlay, PositiveInt, Text
from boltlm.params import from_key
from boltlm.training.config import CompletedModelEntry


@dataclass(frozen=True, kw_only=True, slots=True)
class LargeKConfig:
    """A tighter bound, with `k_samples` latents per chunk, on the first `documents` documents of
    the held-out corpus."""

    k_samples: PositiveInt
    documents: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Params section `evaluate`.

    `corpus` and `extra_corpora` are the held-out corpora. `k_samples` lists each K whose bound is
    reported; the largest of them is the number of latents sampled per chunk. `large_k` asks for one
    more bound (null: none). `tasks` lists task specifications (see TaskSpec), and `cues` the texts
    that follow a question in the space `cot`. `batch_size` is the number of prompts in a batch, and
    `limit` restricts every task to its first questions (null: all). The thought and the answer
    after it have length limits in tokens.
    """

    corpus: Annotated[str, EntryName("corpora")]
    extra_corpora: Annotated[tuple[Annotated[str, EntryName("corpora")], ...], Distinct()]
    k_samples: Annotated[tuple[PositiveInt, ...], NonEmpty(), Distinct()]
    large_k: LargeKConfig | None
    tasks: Annotated[tuple[str, ...], Distinct()]
    cues: Annotated[tuple[str, ...], NonEmpty(), Distinct()]
    backend: Backend
    batch_size: PositiveInt
    max_thought_tokens: PositiveInt
    max_answer_tokens: PositiveInt
    limit: PositiveInt | None

    def __post_init__(self) -> None:
        if self.large_k and self.large_k.k_samples <= max(self.k_samples):
            raise UserError(
                f"large_k.k_samples must be above those of k_samples ({max(self.k_samples)}), found"
                f" {self.large_k.k_samples}"
            )
        for task in self.tasks:
            TaskSpec.parse(task)
        if self.corpus in self.extra_corpora:
            raise UserError(f"extra_corpora must not list the corpus itself, found {self.corpus}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseEvaluateSettings(DrawSettings):
    """Settings of the stage `evaluate_base`: the evaluation of the model `base`, which was trained
    on raw text only."""

    name: str
    evaluate: EvaluateConfig
    benchmarks: Mapping[BenchmarkName, Text]

    def __post_init__(self) -> None:
        for task in self.evaluate.tasks:
            require_benchmark("evaluate.tasks", TaskSpec.parse(task).task, self.benchmarks)

    @property
    def has_latents(self) -> bool:
        """Whether the model was trained to write latents."""
        return False

    @property
    def task_specs(self) -> tuple[TaskSpec, ...]:
        """The tasks that this model can be evaluated on: not in latent space, if it has no
        latents."""
        specs = map(TaskSpec.parse, self.evaluate.tasks)
        return tuple(spec for spec in specs if self.has_latents or spec.space != "latent")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSettings(BaseEvaluateSettings):
    """Settings of the stage `evaluate` for the model `name`, an entry of `models`."""

    model: CompletedModelEntry = from_key("models.{name}")

    @property
    def has_latents(self) -> bool:
        """Whether the model was trained to write latents."""
        return self.model.format == "latent"


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveEntry:
    """Params entry `curves.<name>`: how the snapshots of the model `name` are evaluated.

    `likelihood`: whether the likelihood measures are taken besides the tasks; `documents`: on the
    first documents of each held-out corpus (None: all); `evaluate`: changes to the section
    `evaluate`.
    """

    likelihood: bool
    documents: PositiveInt | None
    evaluate: Annotated[EvaluateConfig, Overlay("evaluate")]


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveSettings(DrawSettings):
    """Settings of the stage `curves` for the snapshots of the model `name`."""

    name: str
    benchmarks: Mapping[BenchmarkName, Text]
    entry: CurveEntry = from_key("curves.{name}")
    model: CompletedModelEntry = from_key("models.{name}")

    def __post_init__(self) -> None:
        if not self.entry.likelihood and not self.evaluation(0).task_specs:
            raise UserError(
                f"curves.{self.name}: there is nothing to measure: likelihood is false, and no task"
                f" of evaluate.tasks is for a model of the format {self.model.format}"
            )

    def evaluation(self, step: int) -> EvaluateSettings:
        """The settings of the evaluation of one snapshot, as of a model of its own."""
        shared = {field.name: getattr(self, field.name) for field in fields(DrawSettings)}
        return EvaluateSettings(
            **shared,
            name=f"{self.name}, step {step}",
            evaluate=self.entry.evaluate,
            benchmarks=self.benchmarks,
            model=self.model,
        )
