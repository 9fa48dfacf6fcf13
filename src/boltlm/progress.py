"""How far a long step is: a bar on a terminal, a plain line now and then elsewhere, ever rarer."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS_BETWEEN_LINES, MOST_OFTEN = 10.0, 0.1  # seconds, and share of the time so far


def track(items: Iterable[T], *, what: str, total: int | None, unit: str) -> Iterator[T]:
    """Yield `items`, showing count, rate and time left on standard error."""
    with Progress(what=what, total=total, unit=unit) as progress:
        for item in items:
            yield item
            progress.advance(1)


class Progress:
    """A bar that is advanced by hand; `note` shows a short text (a loss, a cost) beside it.
    `silent`: another process shows it."""

    def __init__(self, *, what: str, total: int | None, unit: str, silent: bool = False) -> None:
        self.silent = silent
        self.what, self.total, self.unit, self.done, self.text = what, total, unit, 0, ""
        self.started = self.told = time.monotonic()
        terminal = sys.stderr.isatty() and not silent
        self.bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True) if terminal else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        else:
            self._line()

    def expect(self, total: int) -> None:
        """The total, where it is known only now."""
        self.total = total
        if self.bar is not None:
            self.bar.reset(total)

    def note(self, text: str) -> None:
        self.text = text
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)

    def advance(self, count: int) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() - self.told >= self._pause():
            self._line()

    def _pause(self) -> float:
        return max(SECONDS_BETWEEN_LINES, MOST_OFTEN * (self.told - self.started))

    def _line(self) -> None:
        if self.silent:
            return
        self.told = time.monotonic()
        seconds = max(self.told - self.started, 1e-9)
        rate = self.done / seconds
        of = f"/{self.total:,}" if self.total is not None else ""
        left = ""
        if self.total is not None and 0 < self.done < self.total:
            left = f", {(self.total - self.done) / rate:.0f} s left"
        text = f", {self.text}" if self.text else ""
        print(
            f"{self.what}: {self.done:,}{of} {self.unit}, {rate:,.1f} {self.unit}/s,"
            f" {seconds:.0f} s{left}{text}",
            file=sys.stderr,
            flush=True,
        )
