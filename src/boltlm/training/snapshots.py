"""Snapshots: the weights of a model at several steps of its training, in Hugging Face format.

They are collected in the run's folder of unfinished work, so that they survive a kill, and become
the output `snapshots/<name>` when the training is complete. `boltlm.evaluation.snapshot_curves`
measures them.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from boltlm import checkpoint
from boltlm.errors import UserError
from boltlm.shard_store import link_or_copy
from boltlm.training.config import SnapshotConfig
from boltlm.training.continual import RAW_TOKENS_KEY


class SnapshotWriter:
    """The snapshots of one training run, each in a folder `step-<n>` that appears when it is
    complete. Steps and tokens are counted as in the training curve: those of the runs that a
    continual run continues are included.

    `folder`: of this run alone, in its unfinished work; `tokenizer`: the folder whose tokenizer is
    stored with each snapshot; `raw_tokens`: returns the tokens of raw text that were trained on
    after a number of steps of this run; `start`: the steps of the runs before it.
    """

    def __init__(
        self,
        folder: Path,
        config: SnapshotConfig,
        *,
        tokenizer: Path,
        raw_tokens: Callable[[int], int],
        start: int = 0,
    ) -> None:
        self.folder, self.config, self.tokenizer = folder, config, tokenizer
        self.raw_tokens, self.start = raw_tokens, start

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Whether there is to be a snapshot of `step`."""
        return is_last or step % self.config.every == 0

    def is_saved(self, step: int) -> bool:
        """Whether the snapshot of `step` is there. A resumed run that repeats a step finds the one
        that it wrote before."""
        return self._path(step).is_dir()

    def save(
        self, model: PreTrainedModel, weights: Mapping[str, torch.Tensor], step: int, tokens: int
    ) -> None:
        """Write a snapshot. Raises OSError where the disk does not take it: the training ends, and
        resumes at a checkpoint before it, so that none is left out."""
        facts = {
            "steps": step,
            "tokens": tokens,
            RAW_TOKENS_KEY: self.raw_tokens(step - self.start),
        }
        dtype: torch.dtype = getattr(torch, self.config.precision)
        stored = {name: weight.to(dtype) for name, weight in weights.items()}
        path = self._path(step)
        temporary = path.with_name(f".{path.name}")
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
        checkpoint.save_model(model, temporary, self.tokenizer, facts, stored)
        config_path = temporary / "config.json"  # has the precision of the model in training
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config["dtype"] = self.config.precision
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        config_path.write_text(text, encoding="utf-8")
        for file in temporary.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        temporary.replace(path)

    def publish(self, out: Path, steps: int) -> None:
        """Make `out` hold the snapshots of a finished run of `steps` steps and nothing else. The
        files are linked where that is possible, so that they take no more space.

        Raises UserError where one is missing.
        """
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for step in range(self.start + 1, self.start + steps + 1):
            is_last = step == self.start + steps
            if self.is_due(step, is_last=is_last) and not self.is_saved(step):
                raise UserError(
                    f"{self._path(step)}: this snapshot was removed while the training ran; delete"
                    f" {self.folder.parent} and run again"
                )
        for path in sorted(self.folder.glob("step-*")):
            shutil.copytree(path, out / path.name, copy_function=link_or_copy)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09}"
