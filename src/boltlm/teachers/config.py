"""Settings of the stage `teacher`; those of language models are in `model_config`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from boltlm.corpus.inputs import require_input
from boltlm.corpus.sources import FilesSource, HubSource, local_path
from boltlm.errors import UserError
from boltlm.param_types import CommandText, EntryName, Fraction, Name, NonNegativeInt, PositiveInt
from boltlm.params import from_key
from boltlm.teachers.model_config import (
    OpenAIBatchConfig,
    OpenAIChatConfig,
    VLLMTeacherConfig,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetTeacherConfig:
    """`kind: dataset`: the latents that the data set itself carries (its reference latents)."""

    kind: Literal["dataset"]
    corpus: Annotated[str, EntryName("corpora")]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportTeacherConfig:
    """`kind: import`: latents that another data set has for the documents of a corpus of
    `chunks.from_source`, such as those that the authors' models drew in later iterations.

    source: the data set, with `columns.pieces`; its documents are matched by id, text and pieces.
    drawn_by: the model of this experiment in whose place another one drew the latents, so that
      reports show the EM chain; null: none.
    max_unmatched_fraction: fraction of the chunks whose document may be missing in the source, or
      differ in its text or pieces.
    """

    kind: Literal["import"]
    corpus: Annotated[str, EntryName("corpora")]
    source: FilesSource | HubSource
    drawn_by: Annotated[str, EntryName("models")] | None
    max_unmatched_fraction: Fraction

    def __post_init__(self) -> None:
        if self.source.columns.pieces is None:
            raise UserError("source.columns.pieces must name the pieces with latents, found null")
        if self.source.shuffle_buffer != 0:
            raise UserError(
                "source.shuffle_buffer must be 0, because documents are found by their ids,"
                f" found {self.source.shuffle_buffer}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractTeacherConfig:
    """`kind: extract`: a plan taken from the text of each chunk by rules, with at most `phrases`
    key phrases. It is no thought of a person or of a model."""

    kind: Literal["extract"]
    corpus: Annotated[str, EntryName("corpora")]
    phrases: PositiveInt


AnyTeacher = (
    DatasetTeacherConfig
    | ImportTeacherConfig
    | ExtractTeacherConfig
    | OpenAIChatConfig
    | OpenAIBatchConfig
    | VLLMTeacherConfig
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSettings:
    """Settings of the stage `teacher` for the entry `name`.

    context_chunks: chunks before a chunk that the prompt of the task `latent` shows as context.
    max_latent_tokens: maximum length of a latent in tokens; a longer one is unusable.
    """

    name: str
    inputs: Mapping[Name, CommandText]
    teacher: AnyTeacher = from_key("teachers.{name}")
    context_chunks: NonNegativeInt
    max_latent_tokens: PositiveInt

    def __post_init__(self) -> None:
        if isinstance(self.teacher, VLLMTeacherConfig) and Path(self.teacher.model).exists():
            require_input(f"teachers.{self.name}.model", self.teacher.model, self.inputs)
        if isinstance(self.teacher, ImportTeacherConfig):
            path = local_path(self.teacher.source)
            if path is not None:
                require_input(f"teachers.{self.name}.source.path", path, self.inputs)
