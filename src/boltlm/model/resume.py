"""Where a training stands, kept in the work folder so that a killed one goes on at its step."""

import hashlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from boltlm import engine

KEPT = 2  # checkpoints: the last one, and the one before for when that is torn
CODE = ("boltlm.model.training", "boltlm.model.schedules")


def key(
    model: torch.nn.Module, rows: tuple[np.ndarray, np.ndarray], settings: Mapping[str, Any]
) -> str:
    """A name for a training by all that it depends on: first weights, rows, settings, code."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().flatten().view(torch.uint8).numpy())
    for array in rows:
        digest.update(np.ascontiguousarray(array).data)
    facts = {"data": digest.hexdigest(), "code": engine.code(CODE), **settings}
    return engine.key(facts)


class Checkpoints:
    """The checkpoints of one training: `step-<n>.pt` with its checksum, written whole or not at
    all, the last KEPT of them. `every`: steps between two."""

    def __init__(self, work: Path, name: str, every: int, what: str) -> None:
        self.folder, self.every, self.what = work / "train" / name, every, what
        self.kept = 0  # steps of the last one written

    def due(self, steps: int, last: int) -> bool:
        """Whether one is to be written after so many steps, of `last`."""
        return steps % self.every == 0 or steps == last

    def save(self, steps: int, state: Mapping[str, Any]) -> None:
        """A disk that takes it not is told and does not end the training."""
        path = self.folder / f"step-{steps:09}.pt"
        part = path.with_name(path.name + ".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(dict(state), file)
            part.replace(path)
            engine.seal(path)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter
            part.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            said = f"no checkpoint at step {steps} ({reason}); the last is of step {self.kept}"
            print(f"{self.what}: {said}", file=sys.stderr)
            return
        self.kept = steps
        for old in self._paths()[:-KEPT]:
            old.with_name(old.name + ".sha256").unlink(missing_ok=True)
            old.unlink()

    def latest(self) -> dict[str, Any] | None:
        """The newest state that is whole; a torn one is told and passed over."""
        for path in reversed(self._paths()):
            if engine.is_whole(path):
                state = torch.load(path, map_location="cpu", weights_only=True)
                self.kept = state["steps"]
                print(f"{self.what}: going on behind step {self.kept}", file=sys.stderr)
                return state
            print(f"{self.what}: {path.name} is torn; looking at the one before", file=sys.stderr)
        return None

    def clear(self) -> None:
        """The model is published: nothing to go on with."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))
