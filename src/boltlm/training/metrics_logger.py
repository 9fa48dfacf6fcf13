"""The training log: a CSV file with a line every few steps, and wall-clock figures beside it."""

import csv
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Units: loss, val_nll and val_elbo in nats per token; tokens and steps from the start of training,
# those of the runs that a continual run continues included.
TRAIN_COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "val_nll", "val_elbo")
LineLogger = Callable[[Mapping[str, float]], None]


class MetricsLogger:
    """Logs each step; writes a line every `every` steps, after a validation and at the end.

    The columns of the CSV file are TRAIN_COLUMNS; `loss` is the mean over the tokens since the
    previous line. `timings` holds the wall-clock figures, which are not reproducible, of each
    line: step, tokens_per_second, mfu, memory_mib and seconds (of training, pauses included).
    tokens_per_second counts positions, whether or not their token has a loss. `line_logger`
    receives both together.

    `path`: None in a process that writes no file. `ideal_seconds_per_token`: the time that a token
    takes at the peak rate of the hardware, for the MFU. `peak_memory_mib`: returns the maximum
    memory held, MiB. `steps`, `tokens`: those of the runs before a continual run. `state`: what
    `state` of an interrupted run's logger returned; it then continues that log.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        every: int,
        ideal_seconds_per_token: float,
        peak_memory_mib: Callable[[], float],
        steps: int = 0,
        tokens: int = 0,
        state: Mapping[str, Any] | None = None,
        line_logger: LineLogger | None = None,
    ) -> None:
        self.path, self.every, self.line_logger = path, every, line_logger
        self.ideal_seconds_per_token = ideal_seconds_per_token
        self.peak_memory_mib = peak_memory_mib
        state = state or {"step": steps, "tokens": tokens}
        self.step: int = state["step"]
        self.tokens: int = state["tokens"]
        self.lines: list[list[str]] = [*state.get("lines", [])]
        self.timings: list[dict[str, float]] = [*state.get("timings", [])]
        self.loss_sum: float = state.get("loss_sum", 0.0)  # since the previous line
        self.line_tokens: int = state.get("line_tokens", 0)  # since the previous line
        self.line_positions: int = state.get("line_positions", 0)  # since the previous line
        self.first_loss: float | None = state.get("first_loss")  # of the run's first step
        self.line_started = time.monotonic()
        self.started = self.line_started - state.get("seconds", 0.0)

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs to continue the log; plain values."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "lines": self.lines,
            "timings": self.timings,
            "loss_sum": self.loss_sum,
            "line_tokens": self.line_tokens,
            "line_positions": self.line_positions,
            "first_loss": self.first_loss,
            "seconds": time.monotonic() - self.started,
        }

    def __enter__(self) -> "MetricsLogger":
        self.file = None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("w", newline="", encoding="utf-8", buffering=1)
            self.write_failed = False
            self._write([TRAIN_COLUMNS, *self.lines])
        for line, timing in zip(self.lines, self.timings, strict=True):
            self._send(line, timing)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is None:
            return
        with suppress(OSError):  # lines that a full disk did not take are still buffered
            self.file.close()
        if self.write_failed and self.path is not None:
            with self.path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([TRAIN_COLUMNS, *self.lines])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within this context does not count in tokens_per_second."""
        started = time.monotonic()
        yield
        self.line_started += time.monotonic() - started

    def add(
        self,
        tokens: int,
        loss: float,
        *,
        positions: int,
        lr: float,
        grad_norm: float,
        validation: Mapping[str, float],
        last: bool,
    ) -> None:
        """Log one step of `tokens` tokens with a loss at `positions` positions. A step with
        validation metrics has a line of its own, in which a metric that is not finite is left
        blank."""
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.step += 1
        self.tokens += tokens
        self.line_tokens += tokens
        self.line_positions += positions
        self.loss_sum += loss * tokens
        if not (last or validation or self.step % self.every == 0):
            return
        cells = {
            "step": f"{self.step}",
            "tokens": f"{self.tokens}",
            "loss": f"{self.loss_sum / max(self.line_tokens, 1):.6f}",
            "lr": f"{lr:.6g}",
            "grad_norm": f"{grad_norm:.4f}",
            **{name: f"{value:.6f}" for name, value in validation.items() if math.isfinite(value)},
        }
        self.timings.append(self._timing())
        self.lines.append([cells.get(name, "") for name in TRAIN_COLUMNS])
        self._write(self.lines[-1:])
        self._send(self.lines[-1], self.timings[-1])
        self.line_started, self.loss_sum = time.monotonic(), 0.0
        self.line_tokens = self.line_positions = 0

    def _timing(self) -> dict[str, float]:
        now = time.monotonic()
        tokens_per_second = self.line_positions / max(now - self.line_started, 1e-9)
        return {
            "step": self.step,
            "tokens_per_second": round(tokens_per_second),
            "mfu": round(tokens_per_second * self.ideal_seconds_per_token, 4),
            "memory_mib": round(self.peak_memory_mib()),
            "seconds": round(now - self.started, 1),
        }

    def _write(self, lines: Sequence[Sequence[str]]) -> None:
        """Append lines to the file. A write error is reported once and does not end the training;
        the complete file is then written at the end."""
        if self.file is None or self.write_failed:
            return
        try:
            csv.writer(self.file).writerows(lines)
            self.file.flush()
        except OSError as error:
            self.write_failed = True
            print(
                f"{self.path}: {error}; the file will be written at the end of training",
                file=sys.stderr,
            )

    def _send(self, line: Sequence[str], timing: Mapping[str, float]) -> None:
        if self.line_logger is not None:
            cells = zip(TRAIN_COLUMNS, line, strict=True)
            self.line_logger({**{name: float(text) for name, text in cells if text}, **timing})
