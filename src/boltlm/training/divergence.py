"""Stops a training run before an update that would ruin the weights."""

import math

from boltlm.errors import UserError
from boltlm.training.checkpointing import CheckpointManager

MAX_LOSS_RATIO = 2.0  # to the larger of the loss of a uniform guess and that of the first step


def check_divergence(
    loss: float,
    grad_norm: float,
    *,
    step: int,
    first_loss: float | None,
    vocab_size: int,
    checkpoints: CheckpointManager,
) -> None:
    """Raises UserError where the loss or the gradient norm of a step is not finite, or the loss is
    too high. `step`: of this run, from 1; `first_loss`: that of its first step, None before it."""
    uniform_loss = math.log(vocab_size)
    max_loss = MAX_LOSS_RATIO * max(
        uniform_loss, uniform_loss if first_loss is None else first_loss
    )
    exploded = first_loss is not None and loss > max_loss
    if not math.isfinite(loss) or (math.isfinite(grad_norm) and exploded):
        problem = f"the loss is {loss:.4g}"
    elif not math.isfinite(grad_norm):
        problem = f"the gradient norm is {grad_norm}"
    else:
        return
    last_step, folder = checkpoints.last_step, checkpoints.folder
    saved = f"; the checkpoint of step {last_step} is in {folder}" if last_step else ""
    raise UserError(
        f"{checkpoints.what}: {problem} at step {step} of this run{saved}; lower"
        " train.learning_rate"
    )
