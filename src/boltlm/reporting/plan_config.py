"""What `boltlm plan` reads: the sizes that it assumes, the machines that it knows, all entries."""

from collections.abc import Mapping
from dataclasses import dataclass

from boltlm.corpus.corpora import BASE_CORPUS, CorpusEntry
from boltlm.corpus.split import QuestionsConfig
from boltlm.errors import UserError
from boltlm.estep.config import LatentsEntry
from boltlm.evaluation.config import CurveEntry, EvaluateConfig
from boltlm.evaluation.finetune_config import FinetuneRun
from boltlm.param_types import Name, NonNegativeInt, PositiveInt
from boltlm.params import from_key
from boltlm.sequences.layouts import SequenceConfig
from boltlm.teachers.config import AnyTeacher
from boltlm.training.config import (
    CheckpointConfig,
    CompletedModelEntry,
    PretrainConfig,
    TrainConfig,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """What FLOPs and bytes of a model are computed from. `embedding_parameters`: those of an input
    embedding that is not tied to the output, which take part in no matrix product."""

    parameters: PositiveInt
    embedding_parameters: NonNegativeInt
    num_layers: PositiveInt
    hidden_size: PositiveInt

    def flops_per_token(self, sequence_length: int) -> int:
        """FLOPs of a training step for each token, eq. (14)."""
        attention = 6 * self.num_layers * self.hidden_size * sequence_length
        return 6 * (self.parameters - self.embedding_parameters) + attention


def pretrained_size(config: PretrainConfig) -> ModelSize:
    """The size of the Llama that the stage `base` makes: a gated feed-forward network, as many
    heads for keys as for queries, embeddings that are not tied."""
    hidden = config.hidden_size
    layer = 4 * hidden**2 + 3 * hidden * config.intermediate_size + 2 * hidden
    embedding = config.vocab_size * hidden
    return ModelSize(
        parameters=config.num_layers * layer + hidden + 2 * embedding,
        embedding_parameters=embedding,
        num_layers=config.num_layers,
        hidden_size=hidden,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """Section `plan` of params.yaml: sizes in tokens that are assumed before there is data.

    `document_tokens`: of a document, for each corpus; `chunk_tokens`: of a chunk; `latent_tokens`:
    of a latent. `checkpoint`: the size of a base model of the kind `checkpoint`; None: not known,
    and then neither are FLOPs.
    """

    document_tokens: Mapping[Name, PositiveInt]
    chunk_tokens: PositiveInt
    latent_tokens: PositiveInt
    checkpoint: ModelSize | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSettings:
    """Everything of params.yaml that decides how much work an experiment is."""

    plan: PlanConfig
    k_samples: PositiveInt
    context_chunks: NonNegativeInt
    launcher: str
    prompts: str = from_key("prompts.teacher")
    corpora: Mapping[str, CorpusEntry]
    questions: QuestionsConfig
    base: PretrainConfig | CheckpointConfig
    sequences: SequenceConfig
    teachers: Mapping[str, AnyTeacher]
    latents: Mapping[str, LatentsEntry]
    models: Mapping[str, CompletedModelEntry]
    evaluate: EvaluateConfig
    curves: Mapping[str, CurveEntry]
    finetune_runs: Mapping[str, FinetuneRun] = from_key("finetune.runs")
    finetune_epochs: PositiveInt = from_key("finetune.epochs")
    finetune_heldout: float = from_key("finetune.heldout_fraction")
    finetune_seeds: PositiveInt = from_key("finetune.seeds")
    finetune_samples: PositiveInt = from_key("finetune.samples")
    finetune_train: TrainConfig = from_key("finetune.train")

    def __post_init__(self) -> None:
        for name in self.corpora:
            is_used = name != BASE_CORPUS or isinstance(self.base, PretrainConfig)
            if is_used and name not in self.plan.document_tokens:
                raise UserError(
                    f"plan.document_tokens has no entry '{name}'; add the tokens of a document of"
                    " that corpus (an estimate: four characters a token)"
                )

    @property
    def model_size(self) -> ModelSize | None:
        """The size of the base model, None where it is not known."""
        if isinstance(self.base, PretrainConfig):
            return pretrained_size(self.base)
        return self.plan.checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """A device and the FLOP/s that it is assumed to reach in training and in the E-step (drawing
    and scoring latents), and where these figures come from."""

    training: float
    estep: float
    source: str


def _by_peak(peak: float) -> Accelerator:
    """40 % and 20 % of the peak of dense bfloat16 products in FLOP/s."""
    source = (
        f"40 % (training) and 20 % (drawing and scoring) of the {peak / 1e12:.0f} TFLOP/s in"
        " bfloat16 of the maker's data sheet; assumed, not measured here"
    )
    return Accelerator(training=0.4 * peak, estep=0.2 * peak, source=source)


ACCELERATORS = {
    "cpu": Accelerator(
        training=1.0e11,
        estep=0.7e11,
        source="measured with the laptop model on two CPU cores, which count as one device",
    ),
    "h200": _by_peak(989e12),
    "h100": _by_peak(989e12),
    "a100": _by_peak(312e12),
    "l40s": _by_peak(362e12),
    "rtx4090": _by_peak(165e12),
}
