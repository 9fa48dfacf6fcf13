"""Settings of the E-step (docs/method.md, section 4)."""

from dataclasses import dataclass
from typing import Annotated, Literal

from boltlm.errors import UserError
from boltlm.params import EntryName, NonNegativeInt, PositiveInt, Precision, from_key

Selection = Literal["weighted", "uniform"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Params section `sampling`: how latents are drawn and scored, and on how many workers.

    `batch_tokens` bounds the tokens that one batch holds. `rescore_q` computes log q′ with the
    scorer instead of taking it from the sampler. The weights p/q′ are unbiased when q′ is the law
    that the sampler drew from, also where rounding makes it differ from the scorer's; so set it
    only for a sampler that reports other log-probabilities than those that it draws from.
    `gpu_memory_utilization` is the fraction of a GPU's memory that vLLM may use; the scorer needs
    the remainder.

    `executor` says where shards are processed, by `workers` processes (`local`) or actors (`ray`)
    with `gpus_per_worker` GPUs and `threads` CPU threads each. `threads: null` stands for
    OMP_NUM_THREADS or, if that is not set, an equal part of the CPU cores (one core on Ray). The
    number of threads can change the last bits of a sum. `address` is that of a running Ray cluster;
    null starts one on this machine.
    """

    sampler: Literal["transformers", "vllm"]
    precision: Precision
    batch_tokens: PositiveInt
    rescore_q: bool
    gpu_memory_utilization: float
    executor: Literal["local", "ray"]
    workers: PositiveInt
    gpus_per_worker: float
    threads: PositiveInt | None
    address: str | None

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization < 1:
            raise UserError(
                "gpu_memory_utilization must be above 0 and below 1, found"
                f" {self.gpu_memory_utilization}"
            )

    @property
    def fingerprint_facts(self) -> dict[str, str | int | bool]:
        """The fields that samples depend on; those that only say where shards run are excluded."""
        return {
            "sampler": self.sampler,
            "precision": self.precision,
            "batch_tokens": self.batch_tokens,
            "rescore_q": self.rescore_q,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentsEntry:
    """Params entry `latents.<name>`: the model that samples latents, the corpus, K (null: the key
    `k_samples` of params.yaml), and how one of the K latents of a chunk is selected: by its weight,
    eq. (4), or, as a control, uniformly."""

    model: Annotated[str, EntryName("models")]
    corpus: Annotated[str, EntryName("corpora")]
    k_samples: PositiveInt | None
    selection: Selection


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawSettings:
    """What sampling latents depends on, whatever they are used for. `context_chunks`: L, the number
    of preceding raw chunks in a prompt; `max_latent_tokens`: length limit, without EoL."""

    seed: NonNegativeInt
    context_chunks: NonNegativeInt
    max_latent_tokens: PositiveInt
    sampling: SamplingConfig

    @property
    def selection(self) -> Selection:
        """How a latent is selected where no entry of `latents` says it."""
        return "weighted"


@dataclass(frozen=True, kw_only=True, slots=True)
class EStepSettings(DrawSettings):
    """Settings of the stage `latents`. `k_samples`: K for the entries that have none of their
    own."""

    name: str
    k_samples: PositiveInt
    entry: LatentsEntry = from_key("latents.{name}")

    @property
    def num_samples(self) -> int:
        """K, the number of latents drawn for a chunk."""
        return self.entry.k_samples or self.k_samples

    @property
    def selection(self) -> Selection:
        return self.entry.selection
