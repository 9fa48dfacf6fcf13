"""Worker processes on this machine that process one item after another.

A worker keeps what it has loaded from one item to the next. If one dies, all are started anew for
the items that are not finished.
"""

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from boltlm import interruption
from boltlm.errors import UserError

MAX_POOL_RESTARTS = 3
_WAITING_ITEMS = 1  # for each worker, beside the one that it processes: so many are in memory

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# State of a worker process: how its worker is created, and the worker once there is one.
_create: Callable[[], Callable[[Any], Any]] | None = None
_worker: Callable[[Any], Any] | None = None


def process_items(
    creates: Sequence[Callable[[], Callable[[_Item], _Result]]],
    items: Iterable[_Item],
    *,
    what: str,
) -> Iterator[_Result]:
    """Yield the result of each item when it is there, in any order.

    Each process calls one of `creates`, of which there is one for each process, and then the worker
    that it returns with one item after another. Items are taken from the iterable as workers need
    them. Raises what a worker raises, and a UserError where processes die again and again; `what`
    says in messages what they do.
    """
    remaining = iter(items)
    unfinished: list[_Item] = []
    for restarts in range(MAX_POOL_RESTARTS + 1):
        try:
            yield from _run_pool(creates, unfinished, remaining)
            return
        except BrokenProcessPool as error:
            if restarts == MAX_POOL_RESTARTS or interruption.was_interrupted():
                raise UserError(
                    f"{what}: a worker process died (killed, or out of memory), also after"
                    f" {restarts} restarts; what is finished is saved, run again to resume"
                ) from error
            print(
                f"{what}: a worker process died (killed, or out of memory); all are started again",
                file=sys.stderr,
                flush=True,
            )


def _run_pool(
    creates: Sequence[Callable[[], Callable[[_Item], _Result]]],
    unfinished: list[_Item],
    remaining: Iterator[_Item],
) -> Iterator[_Result]:
    """Process the `unfinished` items, in which those taken from `remaining` are kept until they are
    finished. Raises BrokenProcessPool where a process dies."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for create in creates:
        queue.put(create)
    pool = ProcessPoolExecutor(len(creates), context, _initialize, (queue,))
    futures: dict[Future[_Result], _Item] = {}

    def submit(item: _Item) -> None:
        with interruption.without_ctrl_c():  # the first one starts the processes
            futures[pool.submit(_process, item)] = item

    try:
        for item in unfinished:
            submit(item)
        while True:
            free = (1 + _WAITING_ITEMS) * len(creates) - len(futures)
            for item in islice(remaining, max(free, 0)):
                unfinished.append(item)
                submit(item)
            if not futures:
                break
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                result = future.result()
                item = futures.pop(future)
                unfinished[:] = [other for other in unfinished if other is not item]
                yield result
        pool.shutdown()  # with the processes, the memory of their GPUs is free for what follows
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _initialize(creates: Any) -> None:
    global _create
    interruption.end_with_parent(signal.SIGKILL)
    _create = creates.get()  # called with the first item, whose error it is if it fails


def _process(item: Any) -> Any:
    global _worker
    assert _create is not None
    _worker = _worker or _create()
    return _worker(item)
