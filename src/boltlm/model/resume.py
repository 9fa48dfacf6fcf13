"""Where a training stands, kept in the work folder so that a killed one goes on at its step."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from boltlm import engine

KEPT = 2  # checkpoints: the last one, and the one before for when that is torn
PREDECAY = "predecay.pt"


class Checkpoints:
    """The checkpoints of one training in a folder of its own: `step-<n>.pt` with its checksum,
    written whole or not at all, the last KEPT of them; and a continual run's state before its
    decay. `every`: steps between two."""

    def __init__(self, folder: Path, every: int, what: str) -> None:
        self.folder, self.every, self.what = folder, every, what
        self.kept = 0  # steps of the last one written

    def due(self, steps: int, last: int) -> bool:
        """Whether one is to be written after so many steps, of `last`."""
        return steps % self.every == 0 or steps == last

    def save(self, steps: int, state: Mapping[str, Any]) -> None:
        """A disk that takes it not is told and does not end the training."""
        path = self.folder / f"step-{steps:09}.pt"
        try:
            write(path, state)
        except OSError as error:
            path.unlink(missing_ok=True)
            said = f"no checkpoint at step {steps} ({error}); the last is of step {self.kept}"
            print(f"{self.what}: {said}", file=sys.stderr)
            return
        self.kept = steps
        for old in self._paths()[:-KEPT]:
            self._remove(old)

    def latest(self, decay: int | None = None) -> dict[str, Any] | None:
        """The newest state that is whole; a torn one is told, passed over and taken away. `decay`:
        the step at which the state before the decay is kept, which must be there for any state
        beyond. Half-written files of killed processes are taken away too."""
        for part in self.folder.glob(".*"):
            part.unlink()
        lost = decay is not None and not engine.is_whole(self.folder / PREDECAY)
        for path in reversed(self._paths()):
            steps = int(path.stem.removeprefix("step-"))
            beyond = lost and steps > (decay or 0)
            if not beyond and engine.is_whole(path):
                state = read(path)
                self.kept = steps
                print(f"{self.what}: going on behind step {self.kept}", file=sys.stderr)
                return state
            fault = f"is beyond the torn {PREDECAY}" if beyond else "is torn"
            print(f"{self.what}: {path.name} {fault}; looking before it", file=sys.stderr)
            self._remove(path)
        return None

    def clear(self) -> None:
        """The model is published: nothing to go on with."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove(self, path: Path) -> None:
        path.with_name(path.name + ".sha256").unlink(missing_ok=True)
        path.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Tensors and plain values, whole and sealed. Raises OSError where the disk does not take
    them."""
    try:
        with engine.whole(path) as part, part.open("wb") as file:
            torch.save(dict(state), file)
    except RuntimeError as error:  # what torch's writer makes of an error of the disk
        raise OSError(f"{path}: cannot be written; is the disk full?") from error
    engine.seal(path)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote, on the CPU; nothing but tensors and plain values is taken from it."""
    return torch.load(path, map_location="cpu", weights_only=True)
