"""The training curve: `metrics/train/<name>.csv`, a line every n steps."""

import csv
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

COLUMNS = (
    "step",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "utilisation",
    "memory_mib",
    "seconds",
    "heldout_nll",
    "heldout_elbo",
)
Live = Callable[[Mapping[str, float]], None]


class Curve:
    """Lines as they come, the loss averaged over its tokens since the line before. `flops`: of a
    token, as a share of what the machine can do a second; `memory`: MiB held at most. Steps and
    tokens count on from those of a continual run's ancestors. `before`: the `state` of a curve to
    go on with; `path` null: a process that does not write; `live` is told each line."""

    def __init__(
        self,
        path: Path | None,
        *,
        every: int,
        flops: float,
        memory: Callable[[], float],
        steps: int = 0,
        tokens: int = 0,
        before: Mapping[str, Any] | None = None,
        live: Live | None = None,
    ) -> None:
        self.path, self.every, self.live = path, every, live
        self.flops, self.memory = flops, memory
        known = before or {"lines": [], "step": steps, "tokens": tokens, "sum": 0.0, "since": 0}
        self.lines: list[list[str]] = [*known["lines"]]
        self.step: int = known["step"]
        self.tokens: int = known["tokens"]
        self.sum: float = known["sum"]
        self.since: int = known["since"]
        self.first: float | None = known.get("first")  # loss of the very first step
        self.told = time.monotonic()
        self.started = self.told - known.get("seconds", 0.0)

    def state(self) -> dict[str, Any]:
        return {
            "lines": self.lines,
            "step": self.step,
            "tokens": self.tokens,
            "sum": self.sum,
            "since": self.since,
            "first": self.first,
            "seconds": time.monotonic() - self.started,
        }

    def __enter__(self) -> "Curve":
        self.file = None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("w", newline="", encoding="utf-8", buffering=1)
            self.lost = False
            self._write([COLUMNS, *self.lines])
        for line in self.lines if self.live else []:
            self._tell(line)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is None:
            return
        with suppress(OSError):  # what a full disk did not take is in its buffer
            self.file.close()
        if self.lost and self.path is not None:
            with self.path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([COLUMNS, *self.lines])

    def _write(self, lines: Sequence[Sequence[str]]) -> None:
        """To the file as it grows. A disk that takes it not is told once and does not end the
        training: at the end the file is written anew."""
        if self.file is None or self.lost:
            return
        try:
            csv.writer(self.file).writerows(lines)
            self.file.flush()
        except OSError as error:
            self.lost = True
            print(f"{self.path}: {error}; written at the end", file=sys.stderr)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is no part of the tokens a second."""
        started = time.monotonic()
        yield
        self.told += time.monotonic() - started

    def add(
        self,
        tokens: int,
        loss: float,
        *,
        rate: float,
        norm: float,
        heldout: Mapping[str, float],
        last: bool,
    ) -> None:
        """Count one step. One with held-out measures has a line of its own; a bound that no draw
        gave is left blank there."""
        self.first = loss if self.first is None else self.first
        self.step += 1
        self.tokens += tokens
        self.since += tokens
        self.sum += loss * tokens
        if not (last or heldout or self.step % self.every == 0):
            return
        now = time.monotonic()
        speed = self.since / max(now - self.told, 1e-9)
        line = {
            "step": f"{self.step}",
            "tokens": f"{self.tokens}",
            "loss": f"{self.sum / self.since:.6f}",
            "lr": f"{rate:.6g}",
            "grad_norm": f"{norm:.4f}",
            "tokens_per_second": f"{speed:.0f}",
            "utilisation": f"{speed * self.flops:.4f}",
            "memory_mib": f"{self.memory():.0f}",
            "seconds": f"{now - self.started:.1f}",
            **{name: f"{value:.6f}" for name, value in heldout.items() if math.isfinite(value)},
        }
        self.lines.append([line.get(name, "") for name in COLUMNS])
        self._write(self.lines[-1:])
        self._tell(self.lines[-1])
        self.told, self.sum, self.since = time.monotonic(), 0.0, 0

    def _tell(self, line: list[str]) -> None:
        if self.live is not None:
            known = zip(COLUMNS, line, strict=True)
            self.live({name: float(text) for name, text in known if text})
