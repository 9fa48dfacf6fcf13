"""Damaged artefacts of earlier stages and odd rows, as the stages that read them see them."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from boltlm.checkpoint import load_model
from boltlm.corpus.sources import parse_gsm8k_row
from boltlm.errors import UserError
from boltlm.evaluation.grading import grade
from boltlm.records import Chunk, read_shard, read_tokens, shard_name, shard_paths, write_shard
from boltlm.tokens import TextCoder
from boltlm.training.base_model import load_checkpoint
from boltlm.training.checkpointing import read_state

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def copied(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    return folder


def test_a_checkpoint_without_a_layer_is_refused(base_folder: Path, tmp_path: Path) -> None:
    """The library would draw it at random and only warn."""
    folder = copied(base_folder, tmp_path / "model")
    assert load_model(folder) is not None
    weights = load_file(folder / "model.safetensors")
    del weights[WEIGHT]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for load in (load_model, lambda path: load_checkpoint(str(path))):
        with pytest.raises(UserError, match=rf"lacks the weights {WEIGHT}; copy or save it again"):
            load(folder)


def test_damaged_weights_are_named(base_folder: Path, tmp_path: Path) -> None:
    """A file that is cut off, as after a copy that was interrupted."""
    folder = copied(base_folder, tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model: the model cannot be read \(.*\); make it again"):
        load_model(folder)
    with pytest.raises(UserError, match=r"base\.model '.*model' cannot be loaded: "):
        load_checkpoint(str(folder))


class Hostile:
    """A pickle of this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_nothing_that_a_pickle_asks_for_is_done(base_folder: Path, tmp_path: Path) -> None:
    """Neither in a checkpoint of a model nor in one of a training."""
    done = tmp_path / "done"
    content = pickle.dumps({"weight": Hostile(done)})
    folder = copied(base_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    for load in (load_model, lambda path: load_checkpoint(str(path))):
        with pytest.raises((UserError, OSError), match=r"cannot be|no file named"):
            load(folder)
    torch.save({"weight": Hostile(done)}, tmp_path / "step.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        read_state(tmp_path / "step.pt")
    assert not done.exists()
    pickle.loads(content)
    assert done.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", r"config\.json: not JSON"),
        ("config.json", "[]", r"config\.json: expected a JSON object, found list"),
        (
            "config.json",
            "{}",
            r"max_position_embeddings or n_positions must be an integer, found None",
        ),
        ("config.json", '{"n_positions": 9}', r"bos_token_id must be an integer, found None"),
        ("config.json", '{"n_positions": true}', r"n_positions must be an integer, found True"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer"),
    ],
)
def test_damaged_headers_are_named(
    base_folder: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    folder = copied(base_folder, tmp_path / "model")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        TextCoder(folder)


def test_the_window_of_gpt2_is_read(base_folder: Path, tmp_path: Path) -> None:
    folder = copied(base_folder, tmp_path / "model")
    path = folder / "config.json"
    path.write_text(path.read_text().replace("max_position_embeddings", "n_positions"))
    assert TextCoder(folder).context_length == TextCoder(base_folder).context_length


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    """A shard that is missing, cut off, or has flipped bytes in its data."""
    chunk = Chunk(doc_id="d", chunk=0, text="a" * 500, tokens=tuple(range(500)))
    for index in range(3):
        write_shard(tmp_path / shard_name(index), Chunk, [chunk])
    assert len(shard_paths(tmp_path)) == 3
    path = tmp_path / shard_name(1)
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"", whole[:60] + bytes(40) + whole[100:]):
        path.write_bytes(damaged)
        for read in (read_shard, read_tokens):
            with pytest.raises(UserError, match=r"00001\.parquet: cannot be read as Parquet: "):
                read(path, Chunk)
    path.unlink()
    with pytest.raises(UserError, match=r"00001\.parquet is missing; run dvc checkout or repro"):
        shard_paths(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "this one has question"),
        ({"question": "a", "answer": "3"}, "answer without '####'"),
        ({"question": "a", "answer": "3 ####  "}, "answer without a number after '####'"),
        ({"question": None, "answer": "#### 3"}, "column 'question' is not text, found None"),
        ({"question": "a", "answer": 3}, "column 'answer' is not text, found 3"),
        ({"question": "\ud800", "answer": "#### 3"}, "'question' has half of a surrogate pair"),
    ],
)
def test_rows_of_gsm8k_of_another_shape(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_gsm8k_row(row)


@pytest.mark.parametrize("gold", ["", "####", "#### "])
def test_an_empty_gold_answer_makes_no_answer_correct(gold: str) -> None:
    """Least of all one in which no number was found."""
    verdicts = grade("gsm8k", "I do not know.", gold)
    assert not any(verdict.correct for verdict in verdicts.values())
