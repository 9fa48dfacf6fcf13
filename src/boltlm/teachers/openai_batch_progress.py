"""How far the batches in progress are, for the progress display."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from boltlm.teachers.openai_batch_server import RemoteBatchState

_UNITS = (("day", 86_400.0), ("h", 3600.0), ("min", 60.0))


@dataclass(slots=True)
class BatchProgress:
    """What was seen of the batches in progress. `clock`: seconds since 1970. `first`: when each
    batch was first seen with a number of completed requests, and this number."""

    clock: Callable[[], float] = time.time
    states: dict[str, RemoteBatchState] = field(default_factory=dict)
    first: dict[str, tuple[float, int]] = field(default_factory=dict)

    def update(self, state: RemoteBatchState) -> None:
        """Enter the current state of a batch; one that has ended is forgotten."""
        if state.has_ended:
            self.states.pop(state.id, None)
            self.first.pop(state.id, None)
            return
        self.states[state.id] = state
        self.first.setdefault(state.id, (self.clock(), state.completed or 0))

    def describe(self) -> str:
        """For example "5/40 of the batch, 2 h left"; empty where no batch is in progress."""
        if not self.states:
            return ""
        completed = sum(state.completed or 0 for state in self.states.values())
        total = sum(state.total or 0 for state in self.states.values())
        batches = "the batch" if len(self.states) == 1 else f"{len(self.states)} batches"
        text = f"{completed:,}/{total:,} of {batches}" if total else f"{batches} in progress"
        left = [self._seconds_left(state) for state in self.states.values()]
        if None not in left:
            return f"{text}, {format_duration(max(filter(None, left), default=0.0))} left"
        expires = [state.expires_at for state in self.states.values() if state.expires_at]
        if expires and max(expires) > self.clock():
            text += f", at most {format_duration(max(expires) - self.clock())} left"
        return text

    def _seconds_left(self, state: RemoteBatchState) -> float | None:
        """The remaining time at the speed so far; None where nothing has happened yet."""
        since, completed_then = self.first[state.id]
        completed = (state.completed or 0) - completed_then
        if completed <= 0 or state.total is None:
            return None
        remaining = max(0, state.total - completed_then - completed)
        return (self.clock() - since) / completed * remaining


def format_duration(seconds: float) -> str:
    """A duration in its largest unit, such as "2 h"."""
    for unit, size in _UNITS:
        if seconds >= size:
            count = round(seconds / size)
            return f"{count} days" if unit == "day" and count > 1 else f"{count} {unit}"
    return f"{seconds:.0f} s"
