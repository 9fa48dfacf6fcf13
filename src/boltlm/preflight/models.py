"""A checkpoint in a local folder: its configuration, tokenizer and weights, without loading it."""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from boltlm.corpus.readers import split_revision
from boltlm.param_values import Finding
from boltlm.tokens import CONTEXT_LENGTH_KEYS, SPECIAL_TOKENS

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_MAX_HEADER_BYTES = 100_000_000  # of safetensors, as the library allows


def is_hub_name(model: str) -> bool:
    """Whether a model that is no local folder can be one of the hub. A path is not, nor is a name
    whose first part is a folder here: it is a path with a typing error."""
    repository, _ = split_revision(model)
    first = repository.split("/")[0]
    return _HUB_NAME.fullmatch(repository) is not None and not Path(first).exists()


def checkpoint_findings(key: str, model: str) -> Iterator[Finding]:
    """What keeps a checkpoint, named at `key`, from being the base model. Names of the hub are left
    to the check of the machine."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.exists() or not is_hub_name(model):
            yield Finding(
                key, f": there is no folder '{model}'; correct the path, or give a hub name"
            )
        return
    try:
        config = _read_json(folder / "config.json")
        tokenizer = _read_json(folder / "tokenizer.json")
    except ValueError as error:
        yield Finding(key, f": {error}")
        return
    yield from (Finding(key, f": {text}") for text in _problems(folder, config, tokenizer))


def _read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object. Raises ValueError that says what is wrong with the file."""
    if not path.is_file():
        raise ValueError(f"'{path.parent}' has no {path.name}; save model and tokenizer there")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); save the model again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; save the model again")
    return value


def _problems(
    folder: Path, config: Mapping[str, Any], tokenizer: Mapping[str, Any]
) -> Iterator[str]:
    if "auto_map" in config:
        yield f"{folder / 'config.json'} asks for code of its own (auto_map), which is never run"
    window = next((config[key] for key in CONTEXT_LENGTH_KEYS if key in config), None)
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        yield (
            f"{folder / 'config.json'} has no context length ({' or '.join(CONTEXT_LENGTH_KEYS)}),"
            f" found {window!r}"
        )
    yield from _token_problems(folder, config, tokenizer)
    yield from _weight_problems(folder, tokenizer)


def _token_problems(
    folder: Path, config: Mapping[str, Any], tokenizer: Mapping[str, Any]
) -> Iterator[str]:
    """BOS and EOS; special tokens of our own, which only models of this project have."""
    path = folder / "tokenizer_config.json"
    named = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("eos_token_id") is None and not named.get("eos_token"):
        yield f"neither {folder / 'config.json'} nor {path} names an end-of-text token (EOS)"
    added = tokenizer.get("added_tokens") or []
    known = {token.get("content") for token in added if isinstance(token, Mapping)}
    if existing := [token for token in SPECIAL_TOKENS if token in known]:
        yield f"its tokenizer already has {', '.join(existing)}; use a checkpoint without them"


def _vocabulary(tokenizer: Mapping[str, Any]) -> int | None:
    """The greatest token id plus one; None for tokenizers of an unknown form."""
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    added = tokenizer.get("added_tokens") or []
    if isinstance(vocab, Mapping):
        ids = [*vocab.values(), *(token.get("id", -1) for token in added)]
        return max((i for i in ids if isinstance(i, int)), default=-1) + 1
    return len(vocab) if isinstance(vocab, list) else None


def _weight_problems(folder: Path, tokenizer: Mapping[str, Any]) -> Iterator[str]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only {', '.join(pickles)}, which can run code" if pickles else "no weights"
        yield f"'{folder}' has {found}; save the model as safetensors"
        return
    shapes: dict[str, list[int]] = {}
    for path in files:
        try:
            shapes |= _tensor_shapes(path)
        except ValueError as error:
            yield str(error)
    vocabulary = _vocabulary(tokenizer)
    for name, shape in shapes.items():
        if name.endswith(_EMBEDDINGS) and shape and vocabulary and vocabulary > shape[0]:
            yield (
                f"its tokenizer has {vocabulary} tokens, but {name} has only {shape[0]} rows; they"
                " belong to different models"
            )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = set(_read_json(index).get("weight_map", {}).values())
        if missing := sorted(listed - {path.name for path in files}):
            yield f"{index} lists {', '.join(missing)}, which '{folder}' lacks; copy them too"


def _tensor_shapes(path: Path) -> dict[str, list[int]]:
    """The shape of each tensor, from the header of a safetensors file. Raises ValueError where the
    file is damaged or shorter than its header says."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > _MAX_HEADER_BYTES:
                raise ValueError("the header is too long")
            header = json.loads(file.read(size))
        tensors = {name: facts for name, facts in header.items() if name != "__metadata__"}
        end = max((facts["data_offsets"][1] for facts in tensors.values()), default=0)
        if path.stat().st_size != 8 + size + end:
            raise ValueError(f"{path.stat().st_size} bytes, its header says {8 + size + end}")
        return {name: facts["shape"] for name, facts in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy or save it again") from error
