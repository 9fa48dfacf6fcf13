"""How a process ends: after a signal with one line that says how to go on, and with its parent.

Whatever a stage has finished is saved, so nothing has to be completed here. A process that has not
ended by itself a few seconds after a signal, because a library does not return, is ended.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 3.5  # from a signal to the end of a process that does not end by itself
POLL_SECONDS = 0.5  # between two looks at the parent, where the system does not tell of its end
LAUNCHED = "BOLTLM_LAUNCHED"  # set for the processes of a launcher that reports interruptions
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>

_received: list[int] = []  # the signals that came; the first decides the exit code
_raised, _reported = threading.Event(), threading.Event()
_pipe: list[int] = []  # the file descriptors from Python's signal handler in C to the watchdog


def handle_signals() -> None:
    """Let SIGINT and SIGTERM end this process, with its local worker processes, in a few seconds.

    The first one raises KeyboardInterrupt in the main thread. A signal that is ignored (`nohup`)
    stays so. To be called once, in the main thread.
    """
    if LAUNCHED in os.environ:
        _reported.set()
    _pipe.extend(os.pipe())
    os.set_blocking(_pipe[1], False)
    sys.unraisablehook = _show_unraisable
    threading.Thread(target=_watch, name="signals", daemon=True).start()
    restore_handlers()


def restore_handlers() -> None:
    """To be called when a library has set handlers of its own; does nothing in a process that has
    not called `handle_signals`."""
    if not _pipe:
        return
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, _: FrameType | None) -> None:
    _received.append(number)
    if not _raised.is_set():  # launchers repeat the signal that the whole group has got
        _raised.set()
        _kill_workers()
        raise KeyboardInterrupt


def _show_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Python's own hook, but for a KeyboardInterrupt that was raised inside a destructor: the
    watchdog ends the process then."""
    if not (_received and unraisable.exc_type is KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _kill_workers() -> None:
    """Kill what `multiprocessing` has started: a pool would wait for its processes."""
    for worker in multiprocessing.active_children():
        worker.kill()


def _watch() -> None:
    """End this process GRACE_SECONDS after a signal, whatever its main thread does."""
    while (number := os.read(_pipe[0], 1)[0]) not in SIGNALS:
        pass
    _received.append(number)
    time.sleep(GRACE_SECONDS)
    _kill_workers()
    report_interruption()
    os._exit(exit_code())


def was_interrupted() -> bool:
    """Whether a signal has come, so that whatever went wrong since then is its consequence."""
    return bool(_received)


def report_interruption() -> None:
    """Say how to go on: once, and of the processes of a launcher in one only."""
    if not _reported.is_set() and os.environ.get("RANK", "0") == "0":
        _reported.set()
        print("interrupted; run the same command again to resume", file=sys.stderr, flush=True)


def exit_code() -> int:
    """That of a process which ended at the first signal: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def end_with_parent(number: signal.Signals) -> None:
    """Get the signal `number` when the process that has started this one ends, however it ends."""
    started_by = multiprocessing.parent_process()
    parent = os.getppid() if started_by is None or started_by.pid is None else started_by.pid
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, int(number))
        if os.getppid() != parent:  # it ended before that call
            os.kill(os.getpid(), number)
    else:
        arguments = (number, parent)
        threading.Thread(target=_watch_parent, args=arguments, name="parent", daemon=True).start()


def _watch_parent(number: signal.Signals, parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), number)


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Processes that are started inside this context never get SIGINT, also not while they import
    libraries: the stage gets it and ends them."""
    resource_tracker.ensure_running()  # started later, it would let SIGINT through again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
