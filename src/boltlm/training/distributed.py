"""Training in one process or in several: process state, model wrapping, and complete checkpoints.

`accelerate launch` and `torchrun` set the number of processes in the environment. By default each
process has a copy of the model; with `--use_fsdp` weights, gradients and moments are sharded.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

# Long enough for the processes that wait while the main process packs the corpus or validates.
COLLECTIVE_TIMEOUT = timedelta(hours=12)


def process_state() -> PartialState:
    """This process's rank and the number of processes. The first call assigns its device."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=COLLECTIVE_TIMEOUT)


def process_device() -> torch.device:
    """The device on which this process computes."""
    device = process_state().device
    assert device is not None
    return device


def is_sharded() -> bool:
    """Whether the launcher requested FSDP and there is more than one process."""
    return process_state().num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"


def transformer_blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The transformer layers of the model: the units of sharding and compilation."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def wrap_model(module: torch.nn.Module, model: PreTrainedModel) -> torch.nn.Module:
    """`module`, which contains `model`, on this process's device.

    It is returned as it is in a single process, and otherwise sharded by FSDP or wrapped in
    DistributedDataParallel.
    """
    process = process_state()
    if is_sharded():
        # Under FSDP transformers may read the weights in the main process only.
        main = process.is_main_process
        weights = {name: w.cpu().clone() for name, w in module.state_dict().items() if main}
        module.to(process_device())
        mesh = init_device_mesh(process_device().type, (process.num_processes,))
        for block in [*transformer_blocks(model), module]:
            fully_shard(block, mesh=mesh)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(module, weights, options=options)
        return module
    module.to(process_device())
    return DistributedDataParallel(module) if process.num_processes > 1 else module


def gradient_sync(module: torch.nn.Module, is_last: bool) -> AbstractContextManager[Any]:
    """The context of a micro-batch's backward pass: gradients are averaged over the processes
    only with the last micro-batch of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)
    elif isinstance(module, DistributedDataParallel) and not is_last:
        return module.no_sync()
    return nullcontext()


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum of `value` over all processes, in every process."""
    if process_state().num_processes > 1:
        dist.all_reduce(value)
    return value


def broadcast(value: Any) -> Any:
    """The main process's `value`, in every process."""
    if process_state().num_processes == 1:
        return value
    objects = [value]
    dist.broadcast_object_list(objects)
    return objects[0]


def full_state(
    module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Unsharded weights and optimizer moments by parameter name, on the CPU.

    A collective operation: every process must call it. The state is returned in the main process;
    the others get empty mappings.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        "model": get_model_state_dict(module, options=options),
        "optimizers": get_optimizer_state_dict(module, optimizers, options=options),
    }


def full_weights(module: torch.nn.Module) -> dict[str, Any]:
    """Unsharded weights by parameter name, on the CPU, collectively as `full_state`."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options)


def load_full_state(
    module: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: Mapping[str, Any],
) -> None:
    """Load what `full_state` returned, also with a different number of processes.

    A collective operation: every process must call it. Only the main process's `state` is used;
    where it has no key `model`, the weights stay as they are.
    """
    several = process_state().num_processes > 1
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
    main = process_state().is_main_process
    if broadcast("model" in state):
        set_model_state_dict(module, state["model"] if main else {}, options=options)
    moments = state["optimizers"] if main else {}
    set_optimizer_state_dict(module, optimizers, moments, options=options)
