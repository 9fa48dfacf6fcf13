"""Processes that do the work of a stage at the same time, each with GPUs of its own."""

import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from boltlm import interruption
from boltlm.errors import UserError

_Task = TypeVar("_Task")
MAX_RESTARTS = 2  # of a task whose process dies


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """How many tasks are done at once, and what each worker has: whole GPUs (0: whatever this
    process may use) and CPU threads (None: as many as PyTorch takes).

    A single worker works in this process, unless it is `isolated`: then each task has a process of
    its own, as each task of several workers has. `key`: where params.yaml has the number.
    """

    count: int
    gpus_per_worker: int
    threads: int | None
    isolated: bool
    key: str


def run_tasks(
    run: Callable[[_Task, bool], bool], tasks: Mapping[str, _Task], workers: Workers
) -> Iterator[str]:
    """Do the tasks, which are named by their labels; yield each label when its task is done.

    `run(task, wait)` does a task and returns whether it is done. With `wait` false it may decline
    a task that another process is doing; with `wait` true it waits for that process. So stages that
    run at the same time share their tasks. After an error no task is started; what is running is
    completed first, and then the error is raised: a UserError where a process died repeatedly.
    """
    declined = dict(tasks)
    for wait in (False, True):
        waiting, declined = declined, {}
        for label, is_done in _run_once(run, waiting, wait, workers):
            if is_done:
                yield label
            else:
                declined[label] = waiting[label]


def _run_once(
    run: Callable[[_Task, bool], bool], tasks: Mapping[str, _Task], wait: bool, workers: Workers
) -> Iterator[tuple[str, bool]]:
    if workers.count == 1 and not workers.isolated:
        if workers.threads is not None:
            torch.set_num_threads(workers.threads)
        for label, task in tasks.items():
            yield label, run(task, wait)
        return
    gpus: queue.SimpleQueue[str] = queue.SimpleQueue()
    for names in assign_gpus(workers.count, workers.gpus_per_worker, workers.key):
        gpus.put(names)
    pool = ThreadPoolExecutor(workers.count)
    arguments = (run, wait, gpus, workers.threads)
    futures = {pool.submit(_run_task, lbl, task, *arguments): lbl for lbl, task in tasks.items()}
    try:
        for future in as_completed(futures):
            _report_failure(future, futures)
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _report_failure(future: Future[bool], futures: Mapping[Future[bool], str]) -> None:
    """Say at once that a task failed, if the error is raised only when others are completed."""
    running = sum(other.running() for other in futures)
    if future.exception() is not None and running:
        print(
            f"{futures[future]}: failed; waiting for {running} other tasks that are running",
            file=sys.stderr,
        )


def _run_task(
    label: str,
    task: _Task,
    run: Callable[[_Task, bool], bool],
    wait: bool,
    gpus: "queue.SimpleQueue[str]",
    threads: int | None,
) -> bool:
    """Do a task in a process of its own, on GPUs that no other task has meanwhile. The process ends
    with the task, because vLLM gives memory back only then; one that dies is started again, at most
    MAX_RESTARTS times."""
    names, deaths = gpus.get(), 0
    try:
        while True:
            outcome, code = _run_process((run, task, wait, names, threads))
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is not None:
                return outcome
            deaths += 1
            problem = f"{label}: its process ended with exit code {code} (-9: killed, perhaps for"
            if deaths > MAX_RESTARTS or interruption.was_interrupted():
                raise UserError(
                    f"{problem} lack of memory), {deaths} times; what is finished is saved, run"
                    " again to resume"
                )
            print(f"{problem} lack of memory); it is started again", file=sys.stderr, flush=True)
    finally:
        gpus.put(names)


def _run_process(arguments: tuple[Any, ...]) -> tuple[bool | Exception | None, int | None]:
    """What a task in a process of its own returned or raised, None if the process died, and the
    exit code."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_process, args=(sender, *arguments))
    with interruption.without_ctrl_c():
        process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        outcome = None
    process.join()
    return outcome, process.exitcode


def _process(
    sender: Connection,
    run: Callable[[_Task, bool], bool],
    task: _Task,
    wait: bool,
    gpus: str,
    threads: int | None,
) -> None:
    """Of a worker: do one task and send what it returns or raises."""
    interruption.end_with_parent(signal.SIGKILL)
    use_gpus(gpus)
    if threads is not None:
        torch.set_num_threads(threads)
    outcome: bool | Exception
    try:
        outcome = run(task, wait)
    except (UserError, OSError) as error:  # any other is a defect, whose traceback is shown here
        outcome = error
    sender.send(outcome)


def threads_per_worker(threads: int | None, workers: int) -> int | None:
    """`sampling.threads` or, where that is null, an equal part of the cores; None leaves the number
    as it is: that of OMP_NUM_THREADS, or PyTorch's own for a single worker."""
    if threads is not None or workers == 1 or "OMP_NUM_THREADS" in os.environ:
        return threads
    return max(1, len(os.sched_getaffinity(0)) // workers)


def assign_gpus(workers: int, gpus_per_worker: int, key: str) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each worker, a part of what this process may use; "" is all of it.
    `key`: where params.yaml has the number of workers. Raises UserError where there are too few."""
    if gpus_per_worker == 0:
        return [""] * workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if len(gpus) < gpus_per_worker * workers:
        raise UserError(
            f"{key}: {workers} workers need {gpus_per_worker * workers} GPUs, but {len(gpus)} are"
            f" available; lower {key}"
        )
    starts = range(0, gpus_per_worker * workers, gpus_per_worker)
    return [",".join(gpus[start : start + gpus_per_worker]) for start in starts]


def use_gpus(gpus: str) -> None:
    """Restrict this process to some GPUs, before it initializes CUDA; "" is no restriction."""
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
