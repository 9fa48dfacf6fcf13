"""The settings of a training run, and of the stage `train`."""

from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from boltlm.errors import UserError
from boltlm.param_types import (
    EntryName,
    EntryPath,
    NonNegativeFloat,
    NonNegativeInt,
    Overlay,
    PositiveFloat,
    PositiveInt,
    Precision,
    ProperFraction,
    Text,
)
from boltlm.params import from_key
from boltlm.sequences.layouts import DrawChoice, SequenceConfig, SequenceFormat
from boltlm.tokens import SPECIAL_TOKENS
from boltlm.training.schedules import ScheduleConfig

# Settings of how a training run is executed and observed. They change its numbers by rounding at
# most, so a run can be resumed after they were changed.
EXECUTION_FIELDS = (
    "micro_batch_size",
    "activation_checkpointing",
    "compile",
    "log_every",
    "checkpoint_every",
    "validation",
    "log_live",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Validation during training: every `every` steps, on the first `documents` held-out
    documents, with `k_samples` latents for each chunk."""

    every: PositiveInt
    documents: PositiveInt
    k_samples: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotConfig:
    """Weights-only snapshots of a model in training, after every `every` steps and the last one.
    `precision`: of the stored weights."""

    every: PositiveInt
    precision: Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Sections `base.train` and `finetune.train` of params.yaml; `train` has one key more.

    `batch_size`: sequences in a step, over all processes; `micro_batch_size`: sequences in one
    forward and backward pass of a process (None: all of the process's part of the batch).
    `optimizer: muon` updates the matrices of the transformer layers by Muon and all other
    parameters by AdamW. `precision`: of the matrix products; weights are float32.
    `log_every`, `checkpoint_every`: steps. `log_live`: send each line of the log to MLflow at once.
    """

    optimizer: Literal["adamw", "muon"]
    learning_rate: PositiveFloat
    beta1: ProperFraction
    beta2: ProperFraction
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    max_grad_norm: PositiveFloat
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None
    precision: Precision
    activation_checkpointing: bool
    compile: bool
    schedule: ScheduleConfig
    log_every: PositiveInt
    checkpoint_every: PositiveInt
    validation: ValidationConfig | None
    log_live: bool

    def result_settings(self) -> dict[str, Any]:
        """The settings that the trained weights depend on, JSON-ready."""
        values, names = asdict(self), [field.name for field in fields(TrainConfig)]
        return {name: values[name] for name in names if name not in EXECUTION_FIELDS}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTrainConfig(TrainConfig):
    """The section `train`, for the entries of `models`. `snapshots`: None keeps no snapshots."""

    snapshots: SnapshotConfig | None


FLOP_MATCHED_KINDS = ("flop_matched_epochs", "flop_matched_history")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingBudget:
    """How long to train (docs/method.md, section 7): `amount` epochs of `data`, tokens, or steps.

    `flop_matched_epochs`: as many tokens as `amount` epochs of `data` have in the latent format,
    whatever the format of the run is; this matches the FLOPs of the last M-step alone.
    `flop_matched_history`: as many more tokens as cost the FLOPs of the history of `data`.
    """

    kind: Literal["epochs", "tokens", "steps", "flop_matched_epochs", "flop_matched_history"]
    amount: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntry:
    """An entry `models.<name>` of params.yaml, completed from the section `model_defaults`.

    `parent`: the model whose weights the run starts from; `data`: the folder under `data/` with
    the latents or the paraphrases (a raw run names its documents, or the latents whose number of
    tokens it matches); `draws`: which of the K latents drawn for a chunk it is trained on: the
    selected one, one that is chosen afresh by its weight in every epoch, or all, by their weights
    (docs/method.md, 3.5); `mix_raw`: the fraction of the tokens, or of the documents
    (`sequences.mix_unit`), that are raw documents of `mix_corpus`; `seed`: of this training alone,
    null for the key `seed` of params.yaml; `train`: changes to the section `train`.
    """

    parent: Annotated[str, EntryName("models", "base")]
    corpus: Annotated[str, EntryName("corpora")]
    data: Annotated[str, EntryPath(teacher="teachers", latents="latents", split="corpora")]
    format: SequenceFormat
    draws: DrawChoice
    mix_raw: ProperFraction
    mix_corpus: Annotated[str, EntryName("corpora")]
    budget: TrainingBudget
    seed: NonNegativeInt | None
    train: Annotated[ModelTrainConfig, Overlay("train")]

    def __post_init__(self) -> None:
        if self.mix_raw and self.format == "raw" and self.mix_corpus == self.corpus:
            raise UserError(
                "mix_raw must be 0 where the format is raw and mix_corpus is the run's own corpus,"
                f" found {self.mix_raw}"
            )
        if self.draws != "selected" and self.format != "latent":
            raise UserError(
                f"draws must be selected unless the format is latent, found {self.draws} with the"
                f" format {self.format}"
            )
        if self.draws != "selected" and not self.data.startswith("latents/"):
            raise UserError(
                f"draws: {self.draws} needs `data` in latents/, which has the K draws of a chunk;"
                f" found {self.data}"
            )
        kind = self.budget.kind
        if kind in FLOP_MATCHED_KINDS and self.format == "paraphrase":
            raise UserError(
                f"budget.kind {kind} needs latents in `data`, but the format is paraphrase"
            )
        if kind == "flop_matched_history" and not self.data.startswith("latents/"):
            raise UserError(
                f"budget.kind {kind} needs `data` in latents/, which has a record of its compute;"
                f" found {self.data}"
            )


# The keys that an entry does not have are those of the section `model_defaults`.
CompletedModelEntry = Annotated[ModelEntry, Overlay("model_defaults")]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """Everything that the stage `train` reads from params.yaml for the model `name`."""

    name: str
    seed: NonNegativeInt
    context_chunks: NonNegativeInt
    max_latent_tokens: PositiveInt
    sequences: SequenceConfig
    model: CompletedModelEntry = from_key("models.{name}")

    @property
    def training_seed(self) -> int:
        """The seed of the model's entry, or else that of the experiment."""
        return self.seed if self.model.seed is None else self.model.seed

    def __post_init__(self) -> None:
        if self.model.draws == "weighted" and self.sequences.layout != "chunk":
            raise UserError(
                f"models.{self.name}.draws: weighted needs sequences.layout chunk, in which every"
                f" latent can have a sequence of its own; found {self.sequences.layout}"
            )
        in_pieces = self.model.format == "mixed" or (
            self.model.format == "latent" and self.sequences.layout == "chunk"
        )
        if self.model.mix_raw and self.sequences.mix_unit == "documents" and in_pieces:
            raise UserError(
                f"models.{self.name}.mix_raw is {self.model.mix_raw}, but sequences.mix_unit"
                " documents cannot count the documents of the format mixed or of the layout chunk,"
                " which are shuffled in pieces; use mix_unit: tokens or another format or layout"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Section `base` with `kind: pretrain`: the sizes of the Llama, and its training on raw text.

    `context_length` and `sequence_length`: tokens. `vocab_size` includes the special tokens.
    """

    kind: Literal["pretrain"]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    intermediate_size: PositiveInt
    context_length: PositiveInt
    epochs: PositiveInt
    sequence_length: PositiveInt
    train: TrainConfig

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(
                f"hidden_size must be a multiple of 2 × num_heads ({2 * self.num_heads}), because"
                f" rotary positions need heads of an even size; found {self.hidden_size}"
            )
        if not 2 <= self.sequence_length <= self.context_length:
            raise UserError(
                f"sequence_length must be from 2 to context_length ({self.context_length}),"
                f" found {self.sequence_length}"
            )
        min_vocab_size = 256 + len(SPECIAL_TOKENS) + 2
        if self.vocab_size < min_vocab_size:
            raise UserError(
                f"vocab_size must be {min_vocab_size} or more, because every byte has a token,"
                f" found {self.vocab_size}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Section `base` with `kind: checkpoint`: a model in Hugging Face format, by hub name or
    path."""

    kind: Literal["checkpoint"]
    model: Text
