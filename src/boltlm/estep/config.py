"""Settings of the E-step (docs/method.md, section 4)."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from boltlm.errors import UserError
from boltlm.param_types import (
    Above,
    Below,
    EntryName,
    EntryPath,
    NonNegativeFloat,
    NonNegativeInt,
    Overlay,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Precision,
    Text,
)
from boltlm.params import from_key
from boltlm.sequences.layouts import Layout

Selection = Literal["weighted", "uniform", "best"]


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
    with `gpus_per_worker` GPUs and `threads` CPU threads each. With `local`, the stage `curves`
    evaluates as many snapshots at once. `threads: null` stands for OMP_NUM_THREADS or, if that is
    not set, an equal part of the CPU cores (one core on Ray). The number of threads can change the
    last bits of a sum. `address` is that of a running Ray cluster; null starts one on this machine.
    """

    sampler: Literal["transformers", "vllm"]
    precision: Precision
    batch_tokens: PositiveInt
    rescore_q: bool
    gpu_memory_utilization: Annotated[float, Above(0), Below(1)]
    executor: Literal["local", "ray"]
    workers: PositiveInt
    gpus_per_worker: NonNegativeFloat
    threads: PositiveInt | None
    address: Text | None

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
class EStepOptions:
    """Params section `estep`: the estimator (docs/method.md, 4.5). The values of PAPER_OPTIONS are
    the paper's.

    `method`: importance weights chunk by chunk, or sequential Monte Carlo over the chunks of a
    document. `selection`: of one latent, by the weights of eq. (4), uniformly, or the best.
    `temperature` of the proposals. `prior_draws`: how many of the K draws come from p(Z | C).
    Where the effective sample size is below `min_ess_fraction` of the number of draws, there are
    `extra_draws` more. `reuse` of the previous iteration: none, its own draws by multiple
    importance sampling, or its selected latent as one more candidate.
    """

    method: Literal["importance", "smc"]
    selection: Selection
    temperature: PositiveFloat
    prior_draws: NonNegativeInt
    extra_draws: NonNegativeInt
    min_ess_fraction: PositiveFraction
    reuse: Literal["none", "draws", "selected"]

    def __post_init__(self) -> None:
        is_plain = not self.prior_draws and not self.extra_draws
        if self.method == "smc" and not (
            is_plain and self.reuse == "none" and self.selection == "weighted"
        ):
            raise UserError(
                "method smc needs prior_draws 0, extra_draws 0, reuse none and selection weighted"
            )
        if self.reuse == "selected" and not (is_plain and self.selection == "weighted"):
            raise UserError(
                "reuse selected needs prior_draws 0, extra_draws 0 and selection weighted: with"
                " others it does not leave the posterior invariant"
            )
        if self.selection == "uniform" and (self.prior_draws or self.reuse != "none"):
            raise UserError("selection uniform needs prior_draws 0 and reuse none")


PAPER_OPTIONS = EStepOptions(
    method="importance",
    selection="weighted",
    temperature=1.0,
    prior_draws=0,
    extra_draws=0,
    min_ess_fraction=0.5,
    reuse="none",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentsEntry:
    """Params entry `latents.<name>`: the model that samples latents, the corpus, K (null: the key
    `k_samples` of params.yaml), and changes to the section `estep`.

    `previous` and `previous_model`: the entry of `latents` of the iteration before, whose draws or
    selected latents can be reused, and its model. The first iteration has nothing to reuse,
    whatever `estep.reuse` says: it names its chunks and its own model.
    """

    model: Annotated[str, EntryName("models")]
    corpus: Annotated[str, EntryName("corpora")]
    k_samples: PositiveInt | None
    previous: Annotated[str, EntryPath(latents="latents", chunks="corpora")]
    previous_model: Annotated[str, EntryName("models")]
    estep: Annotated[EStepOptions, Overlay("estep")]

    @property
    def options(self) -> EStepOptions:
        """The estimator; the first iteration has nothing to reuse."""
        has_previous = self.previous.startswith("latents/")
        return self.estep if has_previous else replace(self.estep, reuse="none")


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawSettings:
    """What sampling latents depends on, whatever they are used for. `context_chunks`: L, the number
    of preceding raw chunks in a prompt; `max_latent_tokens`: length limit, without EoL."""

    seed: NonNegativeInt
    context_chunks: NonNegativeInt
    max_latent_tokens: PositiveInt
    sampling: SamplingConfig

    @property
    def options(self) -> EStepOptions:
        """The estimator where no entry of `latents` says it: bounds have the paper's."""
        return PAPER_OPTIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class EStepSettings(DrawSettings):
    """Settings of the stage `latents`. `k_samples`: K for the entries that have none of their own;
    `layout`: of the training sequences."""

    name: str
    k_samples: PositiveInt
    layout: Layout = from_key("sequences.layout")
    entry: LatentsEntry = from_key("latents.{name}")

    def __post_init__(self) -> None:
        options = self.options
        if options.prior_draws >= self.num_samples:
            raise UserError(
                f"latents.{self.name}: prior_draws must be below K ({self.num_samples}), found"
                f" {options.prior_draws}"
            )
        if options.reuse != "none" and self.entry.previous_model == self.entry.model:
            raise UserError(
                f"latents.{self.name}: reuse needs a `previous` that another model drew; entries"
                f" with the same model, here {self.entry.model}, have the same draws"
            )
        if options.method == "smc" and self.layout != "document":
            raise UserError(
                f"latents.{self.name}: method smc needs sequences.layout document, in which the"
                f" context of a chunk has latents; found {self.layout}"
            )
        if options.temperature != 1 and self.sampling.sampler == "vllm":
            raise UserError(
                f"latents.{self.name}: a temperature other than 1 needs sampling.sampler"
                " transformers, found vllm"
            )
        if options.extra_draws and self.num_samples == 1 and options.reuse != "draws":
            raise UserError(
                f"latents.{self.name}: extra_draws needs K of 2 or more: the effective sample size"
                " of one draw is always 1"
            )

    @property
    def num_samples(self) -> int:
        """K, the number of latents drawn for a chunk."""
        return self.entry.k_samples or self.k_samples

    @property
    def options(self) -> EStepOptions:
        return self.entry.options
