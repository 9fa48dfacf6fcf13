"""Processing shards in this process, in several processes, or on a Ray cluster.

The output does not depend on the executor: with the same number of threads per worker every one
writes the same bytes, because a shard depends on its own documents only. A worker that dies loses
the shard that it was processing and nothing else.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from typing import Any

import torch

from boltlm.errors import UserError
from boltlm.estep.config import SamplingConfig
from boltlm.estep.contexts import Throughput
from boltlm.estep.shard_worker import ShardTask, ShardWorker
from boltlm.estep.worker_processes import assign_gpus, threads_per_worker, use_gpus

Finish = Callable[[str], object]  # what a worker does with a shard that it has processed

# State of a worker process, set by _initialize_process and _process_shard.
_task: ShardTask | None = None
_finish: Finish | None = None
_threads: int | None = None
_worker: ShardWorker | None = None


def execute_shards(
    task: ShardTask, shards: Sequence[str], finish: Finish | None = None
) -> Iterator[Throughput]:
    """Process shards with the executor that the task's settings name; yield the throughput of each
    when it is complete, in any order. `finish`: called by the worker with each shard that it has
    completed; it must be picklable.

    Raises UserError where a worker process dies or there are fewer GPUs than the workers need.
    """
    config = task.settings.sampling
    if config.executor == "ray":
        return _execute_on_ray(task, shards, config, finish)
    # vLLM gives a GPU's memory back only when its process ends, so its worker has one of its own.
    if config.workers == 1 and config.sampler != "vllm":
        worker = _create_worker(task, config.threads)
        return (_run_worker(worker, shard, finish) for shard in shards)
    return _execute_in_processes(task, shards, config, finish)


def _create_worker(task: ShardTask, threads: int | None) -> ShardWorker:
    if threads is not None:
        torch.set_num_threads(threads)
    return ShardWorker(task)


def _run_worker(worker: ShardWorker, shard: str, finish: Finish | None) -> Throughput:
    throughput = worker(shard)
    if finish is not None:
        finish(shard)
    return throughput


def _execute_in_processes(
    task: ShardTask, shards: Sequence[str], config: SamplingConfig, finish: Finish | None
) -> Iterator[Throughput]:
    """One process per worker, each with its own GPUs if there are any."""
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    workers = min(config.workers, len(shards))
    for gpus in assign_gpus(workers, int(config.gpus_per_worker), "sampling.workers"):
        devices.put(gpus)
    threads = threads_per_worker(config.threads, config.workers)
    arguments = (task, threads, finish, devices)
    pool = ProcessPoolExecutor(workers, context, _initialize_process, arguments)
    try:
        for future in as_completed([pool.submit(_process_shard, shard) for shard in shards]):
            yield future.result()
        pool.shutdown()  # with the processes, the memory of their GPUs is free for what follows
    except BrokenProcessPool as error:
        raise UserError(
            f"sampling for '{task.purpose}': a worker process died (killed, or out of memory);"
            " the finished shards are saved, run again to resume"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _initialize_process(
    task: ShardTask, threads: int | None, finish: Finish | None, devices: Any
) -> None:
    """Assign GPUs to a worker process before it initializes CUDA."""
    global _task, _threads, _finish
    use_gpus(devices.get())
    _task, _threads, _finish = task, threads, finish


def _process_shard(shard: str) -> Throughput:
    global _worker
    assert _task is not None
    _worker = _worker or _create_worker(_task, _threads)
    return _run_worker(_worker, shard, _finish)


def _execute_on_ray(
    task: ShardTask, shards: Sequence[str], config: SamplingConfig, finish: Finish | None
) -> Iterator[Throughput]:
    """One model replica per actor. Ray restarts an actor that dies and repeats its shard."""
    import ray

    cores = config.threads or 1
    if config.address is None:
        # One more logical CPU than the actors reserve; without it Ray's read tasks never start.
        ray.init(num_cpus=config.workers * cores + 1, include_dashboard=False, log_to_driver=False)
    else:
        ray.init(address=config.address, log_to_driver=False)
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
        self.worker, self.finish = _create_worker(task, threads), finish

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (shard,) = batch["shard"]
        throughput = asdict(_run_worker(self.worker, str(shard), self.finish))
        return {"shard": [shard], **{name: [value] for name, value in throughput.items()}}
