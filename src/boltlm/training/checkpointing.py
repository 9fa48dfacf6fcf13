"""Training checkpoints in the work folder, from which a killed training run is resumed."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from boltlm.shard_store import atomic_write, is_complete, mark_complete, remove_complete

MAX_CHECKPOINTS = 2  # the newest, and the one before it in case the newest is corrupt
PREDECAY_FILE = "predecay.pt"


class CheckpointManager:
    """The checkpoints of one training run, in a folder that holds no other run's.

    A checkpoint is a file `step-<n>.pt` with its checksum beside it; the last MAX_CHECKPOINTS stay.
    The folder also holds the state before the decay of a `wsd` schedule. `every`: steps between
    two checkpoints. `last_step`: the number of steps of the newest usable checkpoint, 0 for none.
    """

    def __init__(self, folder: Path, every: int, what: str) -> None:
        self.folder, self.every, self.what = folder, every, what
        self.last_step = 0

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether a checkpoint is saved after `step` of `total_steps` steps."""
        return step % self.every == 0 or step == total_steps

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save the state after `step` steps and remove older checkpoints. A write error is reported
        on standard error, and training continues."""
        path = self.folder / f"step-{step:09}.pt"
        try:
            write_state(path, state)
        except OSError as error:
            path.unlink(missing_ok=True)
            print(
                f"{self.what}: no checkpoint at step {step} ({error}); the newest one is of step"
                f" {self.last_step}",
                file=sys.stderr,
            )
            return
        self.last_step = step
        for old_path in self._paths()[:-MAX_CHECKPOINTS]:
            remove_complete(old_path)

    def load_latest(self, decay_start: int | None = None) -> dict[str, Any] | None:
        """The state of the newest intact checkpoint, None where there is none.

        Corrupt checkpoints are reported and removed, as are the partial files of killed processes.
        `decay_start`: the step at which the state before the decay is saved; where that file is
        corrupt or missing, checkpoints of later steps cannot be used either and are removed.
        """
        for partial_file in self.folder.glob(".*"):
            partial_file.unlink()
        lacks_predecay = decay_start is not None and not is_complete(self.folder / PREDECAY_FILE)
        for path in reversed(self._paths()):
            step = int(path.stem.removeprefix("step-"))
            is_after_decay = lacks_predecay and step > (decay_start or 0)
            if not is_after_decay and is_complete(path):
                state = read_state(path)
                self.last_step = step
                print(f"{self.what}: resuming after step {step}", file=sys.stderr)
                return state
            problem = (
                f"cannot be used without an intact {PREDECAY_FILE}"
                if is_after_decay
                else "is corrupt"
            )
            print(f"{self.what}: {path.name} {problem}; trying an earlier one", file=sys.stderr)
            remove_complete(path)
        return None

    def clear(self) -> None:
        """Remove the folder, once the trained model is published."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values to a file atomically, and mark it complete.

    Raises OSError where the file cannot be written.
    """
    try:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(dict(state), file)
    except RuntimeError as error:  # torch's writer raises it for an error of the disk
        raise OSError(f"{path}: cannot be written; is the disk full?") from error
    mark_complete(path)


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote, on the CPU. Only tensors and plain values are unpickled."""
    return torch.load(path, map_location="cpu", weights_only=True)
