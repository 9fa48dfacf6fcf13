"""Checkpoints in Hugging Face format: load and save."""

import ctypes
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from boltlm.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
Precision = Literal["float32", "bfloat16"]
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare_cpu() -> None:
    """Keep freed memory: fresh pages for every activation cost more than the arithmetic here."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def load(folder: Path, precision: Precision = "float32") -> PreTrainedModel:
    """The causal LM in `folder`, in evaluation mode, on the GPU where there is one."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model in it (config.json); run the stage that trains it")
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, precision))
    return model.to(device()).eval()


def final(folder: Path) -> Path:
    """Where a model's weights to use lie: of a continual run those after the decay."""
    return folder / "final" if (folder / "final").is_dir() else folder


def save(
    model: PreTrainedModel,
    folder: Path,
    tokenizer_from: Path,
    facts: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write weights (safetensors; the model's own where none are given), config, the tokenizer's
    files, and `training.json`."""
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=weights)
    except SafetensorError as error:
        raise OSError(f"{folder}: the model cannot be written ({error}); run again") from error
    if tokenizer_from != folder:
        for name in TOKENIZER_FILES:
            if (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, folder / name)
    text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
    (folder / "training.json").write_text(text, encoding="utf-8")
