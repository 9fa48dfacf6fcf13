"""Where shards are worked on: in this process, in several, or on a Ray cluster.

Every engine makes the same bytes: a shard depends on its documents alone. A worker that dies costs
the shard that it was at.
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

_maker: "Maker | None" = None  # of this worker process


def run(task: "Task", left: Sequence[str], config: SamplingConfig) -> Iterator[Effort]:
    """Make the shards that are left, in any order; yield what each took."""
    if config.engine == "ray":
        return _ray(task, left, config)
    if config.workers == 1:
        return map(_make(task), left)
    return _processes(task, left, config)


def _make(task: "Task") -> "Maker":
    from boltlm.sampling.shards import Maker

    return Maker(task)


def _processes(task: "Task", left: Sequence[str], config: SamplingConfig) -> Iterator[Effort]:
    """One process a worker, each with GPUs of its own where there are any."""
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for worker in range(config.workers):
        places.put(worker)
    workers = min(config.workers, len(left))
    with ProcessPoolExecutor(workers, context, _begin, (task, config, places)) as pool:
        try:
            for done in as_completed([pool.submit(_work, shard) for shard in left]):
                yield done.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"latents.{task.name}: a worker process died (killed, or out of memory); finished"
                " shards are kept, run again to go on"
            ) from error


def _begin(task: "Task", config: SamplingConfig, places: Any) -> None:
    """Set up a worker: its GPUs and its share of the cores, before torch looks at them."""
    global _maker
    worker = places.get()
    gpus = int(config.gpus_per_worker)
    if gpus:
        own = range(worker * gpus, (worker + 1) * gpus)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, own))
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.workers))
    _maker = _make(task)


def _work(shard: str) -> Effort:
    assert _maker is not None
    return _maker(shard)


def _ray(task: "Task", left: Sequence[str], config: SamplingConfig) -> Iterator[Effort]:
    """One model replica an actor; a dead actor is started anew and its shard made again."""
    import ray

    if config.address is None:
        # One logical CPU beside the actors', or the readers would wait for ever.
        ray.init(num_cpus=config.workers + 1, include_dashboard=False, log_to_driver=False)
    else:
        ray.init(address=config.address, log_to_driver=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        blocks = ray.data.from_items(
            [{"shard": shard} for shard in left], override_num_blocks=len(left)
        )
        made = blocks.map_batches(
            _Actor,
            fn_constructor_args=(task,),
            batch_size=1,
            num_cpus=1,
            num_gpus=config.gpus_per_worker,
            compute=ray.data.ActorPoolStrategy(size=min(config.workers, len(left))),
        )
        for row in made.iter_rows():
            yield Effort(**{name: value for name, value in row.items() if name != "shard"})
    finally:
        ray.shutdown()


class _Actor:
    """Holds a model on some node of the cluster. The work folder must be shared by all nodes."""

    def __init__(self, task: "Task") -> None:
        self.maker = _make(task)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from dataclasses import asdict

        (shard,) = batch["shard"]
        facts = asdict(self.maker(str(shard)))
        return {"shard": [shard], **{name: [value] for name, value in facts.items()}}
