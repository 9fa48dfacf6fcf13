"""Progress of a long step: a bar on a terminal, elsewhere a plain line at growing intervals."""

import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

_T = TypeVar("_T")
# The least time between two lines: in seconds, and as a fraction of the time since the start.
MIN_SECONDS, MIN_ELAPSED_FRACTION = 10.0, 0.1
# A run in which nothing is finished says so after this time, and each time that it has doubled.
STALL_SECONDS = 60.0


def track_progress(items: Iterable[_T], *, what: str, total: int | None, unit: str) -> Iterator[_T]:
    """Yield `items` and show their count, their rate and the remaining time on standard error."""
    with Progress(what=what, total=total, unit=unit) as progress:
        for item in items:
            yield item
            progress.advance(1)


class Progress:
    """A progress display that is advanced by hand. `note` adds a short text to it, such as the loss
    or the cost. `silent`: another process shows the progress. Worker processes print lines, because
    several bars would overwrite each other."""

    def __init__(self, *, what: str, total: int | None, unit: str, silent: bool = False) -> None:
        self.what, self.total, self.unit, self.silent = what, total, unit, silent
        self.count, self.text = 0, ""
        self.started = self.last_line = self.last_advance = time.monotonic()
        # After so long without progress the next line says that nothing is finished.
        self.stall_seconds = STALL_SECONDS
        is_worker = multiprocessing.parent_process() is not None
        terminal = sys.stderr.isatty() and not silent and not is_worker
        self.bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True) if terminal else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        else:
            self._print_line()

    def set_total(self, total: int) -> None:
        """Set the total where it is known only after the start."""
        self.total = total
        if self.bar is not None:
            self.bar.reset(total)

    def note(self, text: str) -> None:
        """Show a short text beside the count."""
        self.text = text
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)

    def advance(self, count: int) -> None:
        """Add `count` finished units."""
        self.count += count
        self.last_advance, self.stall_seconds = time.monotonic(), STALL_SECONDS
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() - self.last_line >= self._interval():
            self._print_line()

    def tick(self) -> None:
        """Show the state although nothing was finished; to be called about every second."""
        now = time.monotonic()
        stalled = now - self.last_advance >= self.stall_seconds
        if self.bar is not None:
            self.bar.set_postfix_str(self.text + self._stall_text(), refresh=True)
        elif stalled or now - self.last_line >= self._interval():
            self._print_line()
        if stalled:
            self.stall_seconds *= 2

    def _stall_text(self) -> str:
        seconds = time.monotonic() - self.last_advance
        return f"; no {self.unit} for {seconds:.0f} s" if seconds >= STALL_SECONDS else ""

    def _interval(self) -> float:
        return max(MIN_SECONDS, MIN_ELAPSED_FRACTION * (self.last_line - self.started))

    def _print_line(self) -> None:
        if self.silent:
            return
        self.last_line = time.monotonic()
        seconds = max(self.last_line - self.started, 1e-9)
        rate = self.count / seconds
        total = f"/{self.total:,}" if self.total is not None else ""
        remaining = ""
        if self.total is not None and 0 < self.count < self.total:
            remaining = f", {(self.total - self.count) / rate:.0f} s left"
        text = (f", {self.text}" if self.text else "") + self._stall_text()
        print(
            f"{self.what}: {self.count:,}{total} {self.unit}, {rate:,.1f} {self.unit}/s,"
            f" {seconds:.0f} s{remaining}{text}",
            file=sys.stderr,
            flush=True,
        )
