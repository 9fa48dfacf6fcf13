"""Batches of training sequences, and their gradient over micro-batches and processes.

Shapes: B sequences of the batch, L positions.
"""

from typing import Protocol

import numpy as np
import torch

from boltlm.seeds import generator
from boltlm.sequences.packing import IGNORE_INDEX
from boltlm.training import distributed
from boltlm.training.config import TrainConfig


class TrainingDataset(Protocol):
    """Training sequences in their order: packed ones, or examples for fine-tuning."""

    @property
    def sequence_length(self) -> int: ...
    def __len__(self) -> int: ...
    def batch(self, step: int, batch_size: int) -> tuple[np.ndarray, ...]:
        """(inputs_BL, labels_BL) of a step, int64; IGNORE_INDEX marks labels without loss. Where
        the labels have weights in the loss, weights_BL follows, float32."""
        ...

    def num_target_tokens(self, first_step: int, batch_size: int) -> int:
        """How many labels the steps from `first_step` on have, ignored ones aside."""
        ...


def accumulate_gradients(
    module: torch.nn.Module, batch: tuple[np.ndarray, ...], config: TrainConfig
) -> tuple[float, int]:
    """Add the gradient of the batch's mean loss to the parameters; return that loss (nats per
    target token) and the number of target tokens. Without a target token both are 0.

    `batch`: as `TrainingDataset.batch` returns it. With weights the loss of each target token is
    multiplied by its weight; the sum is still divided by their number. Every process takes
    the same number of its sequences, some of them padding if necessary, and works through them in
    micro-batches.
    """
    process, device = distributed.process_state(), distributed.process_device()
    tokens = int((batch[1] != IGNORE_INDEX).sum())
    world_size = process.num_processes
    local_size = -(-len(batch[0]) // world_size)
    local_batch = [array[process.process_index :: world_size] for array in batch]
    padding = local_size - len(local_batch[0])
    if padding:
        local_batch = [
            np.pad(array, ((0, padding), (0, 0)), constant_values=fill)
            for array, fill in zip(local_batch, (0, IGNORE_INDEX, 0), strict=False)
        ]
    tensors = [torch.from_numpy(array).to(device) for array in local_batch]
    size = config.micro_batch_size or local_size
    total = torch.zeros((), device=device)
    for start in range(0, local_size, size):
        autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=config.precision == "bfloat16"
        )
        with distributed.gradient_sync(module, start + size >= local_size):
            with autocast:
                loss = module(*(tensor[start : start + size] for tensor in tensors))
            (loss * (world_size / max(tokens, 1))).backward()
        total += loss.detach()
    return float(distributed.all_reduce_sum(total)) / max(tokens, 1), tokens


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's dropout in this process. With one for each step, checkpoints need not
    hold the state of a random generator."""
    process_index = distributed.process_state().process_index
    return int(generator(seed, "step", step, process_index).integers(2**62))
