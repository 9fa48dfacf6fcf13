"""What the hardware can do and what a run takes of it: peak rate and memory, measured here."""

import resource
import time
from functools import cache

import torch

MATRIX_SIZES = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product is timed
TIMED_PRODUCTS = 5


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
