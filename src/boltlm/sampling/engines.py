"""Where shards are worked on: in this process, in several, or on a Ray cluster.

Every engine makes the same bytes with the same number of threads: a shard depends on its documents
alone. A worker that dies costs the shard that it was at.
"""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from boltlm.errors import UserError
from boltlm.sampling.estep import Effort, SamplingConfig

if TYPE_CHECKING:
    from boltlm.sampling.shards import Maker, Task

# Of this worker process.
_task: "Task | None" = None
_threads: int | None = None
_maker: "Maker | None" = None


def run(task: "Task", left: Sequence[str], config: SamplingConfig) -> Iterator[Effort]:
    """Make the shards that are left, in any order; yield what each took."""
    if config.engine == "ray":
        return _ray(task, left, config)
    if config.workers == 1:
        return map(_make(task, config.threads), left)
    return _processes(task, left, config)


def _make(task: "Task", threads: int | None) -> "Maker":
    import torch

    from boltlm.sampling.shards import Maker

    if threads is not None:
        torch.set_num_threads(threads)
    return Maker(task)


def _processes(task: "Task", left: Sequence[str], config: SamplingConfig) -> Iterator[Effort]:
    """One process a worker, each with GPUs of its own where there are any."""
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for gpus in _shares(config):
        places.put(gpus)
    workers = min(config.workers, len(left))
    threads = config.threads
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // config.workers)
    pool = ProcessPoolExecutor(workers, context, _begin, (task, threads, places))
    try:
        for done in as_completed([pool.submit(_work, shard) for shard in left]):
            yield done.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"latents.{task.name}: a worker process died (killed, or out of memory); finished"
            " shards are kept, run again to go on"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _shares(config: SamplingConfig) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each worker, out of what this process may see."""
    each = int(config.gpus_per_worker)
    if each == 0:
        return [""] * config.workers
    import torch

    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
    if len(gpus) < each * config.workers:
        raise UserError(
            f"sampling: {config.workers} workers of {each} GPUs each, but {len(gpus)} GPUs are"
            " here; lower workers or gpus_per_worker"
        )
    return [",".join(gpus[each * i : each * (i + 1)]) for i in range(config.workers)]


def _begin(task: "Task", threads: int | None, places: Any) -> None:
    """Set up a worker: its GPUs, before torch looks at them."""
    global _task, _threads
    gpus = places.get()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    _task, _threads = task, threads


def _work(shard: str) -> Effort:
    global _maker
    assert _task is not None
    _maker = _maker or _make(_task, _threads)
    return _maker(shard)


def _ray(task: "Task", left: Sequence[str], config: SamplingConfig) -> Iterator[Effort]:
    """One model replica an actor; a dead actor is started anew and its shard made again."""
    import ray

    cores = config.threads or 1
    if config.address is None:
        # One logical CPU beside the actors', or the readers would wait for ever.
        ray.init(num_cpus=config.workers * cores + 1, include_dashboard=False, log_to_driver=False)
    else:
        ray.init(address=config.address, log_to_driver=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        blocks = ray.data.from_items(
            [{"shard": shard} for shard in left], override_num_blocks=len(left)
        )
        made = blocks.map_batches(
            _Actor,
            fn_constructor_args=(task, cores),
            batch_size=1,
            num_cpus=cores,
            num_gpus=config.gpus_per_worker,
            compute=ray.data.ActorPoolStrategy(size=min(config.workers, len(left))),
        )
        for row in made.iter_rows():
            yield Effort(**{name: value for name, value in row.items() if name != "shard"})
    finally:
        ray.shutdown()


class _Actor:
    """Holds a model on some node of the cluster. The work folder must be shared by all nodes."""

    def __init__(self, task: "Task", threads: int) -> None:
        self.maker = _make(task, threads)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from dataclasses import asdict

        (shard,) = batch["shard"]
        facts = asdict(self.maker(str(shard)))
        return {"shard": [shard], **{name: [value] for name, value in facts.items()}}
