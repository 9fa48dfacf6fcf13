"""Processing shards in this process, in several processes, or on a Ray cluster.

The output does not depend on the executor: with the same number of threads per worker every one
writes the same bytes, because a shard depends on its own documents only. A worker that dies loses
the shards that are being processed and nothing else; workers are started anew for them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from boltlm import interruption
from boltlm.estep.config import SamplingConfig
from boltlm.estep.contexts import Throughput
from boltlm.estep.shard_worker import ShardTask, ShardWorker
from boltlm.estep.worker_processes import assign_gpus, threads_per_worker, use_gpus
from boltlm.worker_pool import process_items

Finish = Callable[[str], object]  # what a worker does with a shard that it has completed


def execute_shards(
    task: ShardTask, shards: Sequence[str], finish: Finish | None = None
) -> Iterator[Throughput]:
    """Process shards with the executor that the task's settings name; yield the throughput of each
    when it is complete, in any order. `finish`, which must be picklable, is called with each shard
    by the worker that has completed it.

    Raises UserError where worker processes die again and again, or where there are fewer GPUs than
    the workers need.
    """
    config = task.settings.sampling
    if config.executor == "ray":
        return _execute_on_ray(task, shards, config, finish)
    # vLLM gives a GPU's memory back only when its process ends, so its worker has one of its own.
    if config.workers == 1 and config.sampler != "vllm":
        return map(_create_worker(task, config.threads, finish), shards)
    return _execute_in_processes(task, shards, config, finish)


def _create_worker(
    task: ShardTask, threads: int | None, finish: Finish | None
) -> Callable[[str], Throughput]:
    if threads is not None:
        torch.set_num_threads(threads)
    worker = ShardWorker(task)

    def process(shard: str) -> Throughput:
        throughput = worker(shard)
        if finish is not None:
            finish(shard)
        return throughput

    return process


def _execute_in_processes(
    task: ShardTask, shards: Sequence[str], config: SamplingConfig, finish: Finish | None
) -> Iterator[Throughput]:
    """One process per worker, each with its own GPUs if there are any."""
    workers = min(config.workers, len(shards))
    threads = threads_per_worker(config.threads, config.workers)
    gpus = assign_gpus(workers, int(config.gpus_per_worker), "sampling.workers")
    creates = [partial(_create_on_gpus, task, threads, finish, names) for names in gpus]
    return process_items(creates, shards, what=f"sampling for '{task.purpose}'")


def _create_on_gpus(
    task: ShardTask, threads: int | None, finish: Finish | None, gpus: str
) -> Callable[[str], Throughput]:
    """The worker of a process of its own, which has not initialised CUDA yet."""
    use_gpus(gpus)
    return _create_worker(task, threads, finish)


def _execute_on_ray(
    task: ShardTask, shards: Sequence[str], config: SamplingConfig, finish: Finish | None
) -> Iterator[Throughput]:
    """One model replica per actor. Ray restarts an actor that dies and repeats its shard."""
    import ray

    cores = config.threads or 1
    if config.address is None:
        # One more logical CPU than the actors reserve; without it Ray's read tasks never start.
        cpus = config.workers * cores + 1
        # Without an address Ray would look for the remains of a cluster whose driver was killed.
        ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    else:
        ray.init(config.address, log_to_driver=False)
    interruption.restore_handlers()  # Ray has set a handler of its own
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        names = ray.data.from_items(
            [{"shard": shard} for shard in shards], override_num_blocks=len(shards)
        )
        results = names.map_batches(
            _ShardActor,
            fn_constructor_args=(task, cores, finish),
            batch_size=1,
            num_cpus=cores,
            num_gpus=config.gpus_per_worker,
            compute=ray.data.ActorPoolStrategy(size=min(config.workers, len(shards))),
        )
        for row in results.iter_rows():
            yield Throughput(**{name: value for name, value in row.items() if name != "shard"})
    finally:
        ray.shutdown()


class _ShardActor:
    """A worker on some node of the cluster. All nodes must share the work folder."""

    def __init__(self, task: ShardTask, threads: int, finish: Finish | None) -> None:
        self.worker = _create_worker(task, threads, finish)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (shard,) = batch["shard"]
        throughput = asdict(self.worker(str(shard)))
        return {"shard": [shard], **{name: [value] for name, value in throughput.items()}}
