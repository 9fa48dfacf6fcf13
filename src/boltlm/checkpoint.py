"""Models in Hugging Face format: load and save."""

import ctypes
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from boltlm.errors import UserError
from boltlm.param_types import Precision

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # parameters of mallopt(3)


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Have malloc keep the memory that is freed: on a CPU, asking the kernel for fresh pages for
    every activation takes longer than the arithmetic of a small model."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def load_model(folder: Path, precision: Precision = "float32") -> PreTrainedModel:
    """The causal LM in `folder`, in evaluation mode, on the GPU where there is one.

    Raises UserError where the folder holds no model, or one that is damaged or lacks weights.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model in it (config.json); run the stage that trains it")
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, precision), use_safetensors=True, output_loading_info=True
        )
    except (ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: the model cannot be read ({reason}); make it again") from error
    model, report = loaded
    require_all_weights(str(folder), report)
    return model.to(default_device()).eval()


def require_all_weights(what: str, report: Mapping[str, Any]) -> None:
    """Raises UserError where the library reports that it has drawn weights at random, because the
    files lack them or have them in another shape."""
    if missing := sorted(map(str, report["missing_keys"])):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{what} lacks the weights {missing[0]}{more}; copy or save it again")
    if other := sorted(map(str, report["mismatched_keys"])):
        raise UserError(f"{what} has weights of another shape than its config.json: {other[0]}")


def final_weights(folder: Path) -> Path:
    """The folder with the weights to use: `final` in a model of the continual schedule, which keeps
    its weights before the decay beside them, else the model's folder itself."""
    return folder / "final" if (folder / "final").is_dir() else folder


def save_model(
    model: PreTrainedModel,
    folder: Path,
    tokenizer_from: Path,
    facts: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write weights (safetensors; by default the model's own), configuration, tokenizer files, and
    `facts` as `training.json`. Raises OSError where the disk does not take them."""
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
