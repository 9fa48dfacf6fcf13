"""How much arithmetic training is, and how much of it the machine could do."""

import resource
import time
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

SIZES = {"cpu": 1024, "cuda": 8192}  # of the square matrices that are timed
REPEATS = 5


def per_token(model: PreTrainedModel, length: int) -> float:
    """Floating-point operations of a training step for one token of a row of `length`: six for
    each weight in a matrix product, and attention over half of the row on the average. What
    activation checkpointing does again does not count."""
    config = model.config
    looked_up: Any = model.get_input_embeddings()
    tied = looked_up.weight is getattr(model.get_output_embeddings(), "weight", None)
    weights = sum(parameter.numel() for parameter in model.parameters())
    multiplied = weights - (0 if tied else looked_up.weight.numel())
    attention = 6 * config.num_hidden_layers * config.hidden_size * length
    return 6 * multiplied + attention


@cache
def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product here, measured: the best of a few."""
    size = SIZES.get(device.type, 1024)
    one = torch.randn(size, size, device=device, dtype=dtype)

    def seconds() -> float:
        started = time.perf_counter()
        torch.mm(one, one)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return 2 * size**3 / min(seconds() for _ in range(REPEATS))


def memory_mib(device: torch.device) -> float:
    """The most memory that this process has held: of its GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
