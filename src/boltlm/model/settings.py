"""What a training is told, and the optimisers that it asks for."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from boltlm.errors import UserError
from boltlm.model.schedules import Schedule

# How the same training is carried out; numbers hang on it by their last bits at most.
HOW = (
    "micro_rows",
    "activation_checkpointing",
    "compile",
    "log_every",
    "checkpoint_every",
    "evaluate",
    "live",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class During:
    """Held-out measures in the curve: every so many steps, of so many documents, with K draws."""

    every: int
    documents: int
    k_samples: int

    def __post_init__(self) -> None:
        positive(self, "every", "documents", "k_samples")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Params sections `train` and `base.train`. `batch_rows`: sequences a step, over all
    processes; `micro_rows`: of them at once in a process (null: all of its share); `muon` takes
    the matrices of the layers and leaves embeddings, output and norms to AdamW; `log_every` and
    `checkpoint_every`: steps; `live`: whether each line of the curve goes to MLflow at once."""

    optimizer: Literal["adamw", "muon"]
    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_norm: float
    batch_rows: int
    micro_rows: int | None
    precision: Literal["float32", "bfloat16"]
    activation_checkpointing: bool
    compile: bool
    schedule: Schedule
    log_every: int
    checkpoint_every: int
    evaluate: During | None
    live: bool

    def __post_init__(self) -> None:
        positive(self, "learning_rate", "clip_norm", "batch_rows", "micro_rows", "log_every")
        positive(self, "checkpoint_every", "epsilon")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UserError(f"beta1, beta2 lie in [0, 1), found {self.beta1}, {self.beta2}")
        if not self.weight_decay >= 0:
            raise UserError(f"weight_decay must be 0 or more, found {self.weight_decay}")

    def settings(self) -> dict[str, Any]:
        """What the numbers hang on, JSON-ready."""
        return {name: value for name, value in asdict(self).items() if name not in HOW}


def positive(config: object, *names: str) -> None:
    """Raises UserError where one of the named fields is 0 or less."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"{name} must be above 0, found {value}")


def optimizers(model: torch.nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW over all, or Muon over the layers' matrices and AdamW over the rest."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = ".layers." in name and parameter.ndim == 2
        (matrices if inner and config.optimizer == "muon" else rest).append(parameter)
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            rest,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
    ]
    if matrices:
        made.append(
            torch.optim.Muon(
                matrices,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return made
