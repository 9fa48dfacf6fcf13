"""Model FLOPs utilization (MFU): the arithmetic of training, and the peak rate of the hardware."""

import resource
import time
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

MATRIX_SIZES = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product is timed
TIMED_PRODUCTS = 5


def flops_per_token(model: PreTrainedModel, sequence_length: int) -> float:
    """Floating-point operations of a training step for each token.

    Six for each weight that takes part in a matrix product, and those of causal attention, which
    covers half of the sequence on average. What activation checkpointing recomputes is not
    counted.
    """
    config = model.config
    embedding: Any = model.get_input_embeddings()
    tied = embedding.weight is getattr(model.get_output_embeddings(), "weight", None)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    matmul_weights = num_weights - (0 if tied else embedding.weight.numel())
    attention = 6 * config.num_hidden_layers * config.hidden_size * sequence_length
    return 6 * matmul_weights + attention


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, the best of a few measured
    on this device."""
    size = MATRIX_SIZES.get(device.type, 1024)
    matrix = torch.randn(size, size, device=device, dtype=dtype)

    def product_seconds() -> float:
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return 2 * size**3 / min(product_seconds() for _ in range(TIMED_PRODUCTS))


def peak_memory_mib(device: torch.device) -> float:
    """The maximum memory that this process has held, MiB: of its GPU, or of the host on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
