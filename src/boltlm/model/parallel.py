"""One process or many: who is here, how a model is spread over them, and its state as a whole.

`accelerate launch` and `torchrun` say in the environment how many processes there are; with
`--use_fsdp` the weights, gradients and moments are sharded over them, else each has a copy.
"""

import os
from collections.abc import Sequence
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

PATIENCE = timedelta(hours=12)  # of processes that wait for one that packs or measures


def machine() -> PartialState:
    """This process among its fellows; it is on a device of its own from now on."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def device() -> torch.device:
    """Where this process computes."""
    found = machine().device
    assert found is not None
    return found


def sharded() -> bool:
    """Whether the launcher asked for FSDP."""
    return machine().num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"


def blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The model's layers: what is sharded, recomputed or compiled as one."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def spread(module: torch.nn.Module, model: PreTrainedModel) -> torch.nn.Module:
    """`module`, which holds `model`, on this process's device: itself where it is alone, sharded,
    or as one of several copies whose gradients are averaged."""
    here = machine()
    if sharded():
        # Under FSDP transformers may read the weights in the main process only.
        main = here.is_main_process
        weights = {name: w.cpu().clone() for name, w in module.state_dict().items() if main}
        module.to(device())
        mesh = init_device_mesh(device().type, (here.num_processes,))
        for block in [*blocks(model), module]:
            fully_shard(block, mesh=mesh)
        whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(module, weights, options=whole)
        return module
    module.to(device())
    return DistributedDataParallel(module) if here.num_processes > 1 else module


def accumulating(module: torch.nn.Module, last: bool) -> AbstractContextManager[Any]:
    """For one of a step's micro-batches: gradients are averaged over processes with the last."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def added_up(value: torch.Tensor) -> torch.Tensor:
    """The sum over processes."""
    if machine().num_processes > 1:
        dist.all_reduce(value)
    return value


def told(value: Any) -> Any:
    """What the main process says, in every process."""
    if machine().num_processes == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said)
    return said[0]


def state(module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Weights and moments as one process alone would have them, by the parameters' names; in the
    main process, empty in the others. All must call it."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        "model": get_model_state_dict(module, options=whole),
        "optimizers": get_optimizer_state_dict(module, optimizers, options=whole),
    }


def restore(
    module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], found: dict[str, Any]
) -> None:
    """Take over what `state` gave, also with another number of processes. All must call it; only
    the main process's `found` counts, and its weights only where it has some."""
    several = machine().num_processes > 1
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
    main = machine().is_main_process
    if told("model" in found):
        set_model_state_dict(module, found["model"] if main else {}, options=whole)
    moments = found["optimizers"] if main else {}
    set_optimizer_state_dict(module, optimizers, moments, options=whole)
