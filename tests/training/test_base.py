"""The base model: the special tokens, model folders that load again, tokenizers without a leading
space."""

import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from boltlm import checkpoint
from boltlm.errors import UserError
from boltlm.fingerprint import hash_path
from boltlm.params import build_settings, load
from boltlm.timing import read_timing
from boltlm.tokens import EOL, POST, PRIOR, SOL, SPECIAL_TOKENS, TextCoder
from boltlm.training.base import BaseSettings, run_base
from boltlm.training.base_model import NEW_EMBEDDING_NOISE, add_special_tokens, load_checkpoint
from boltlm.training.metrics_logger import TRAIN_COLUMNS
from boltlm.training.tokenizer import BOS_TEXT, EOS_TEXT, remove_leading_space, train_tokenizer
from tests import tiny
from tests.training.harness import column, read_log


def make_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(iter(["It is 12, and 7."]), 270)


def embeddings(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The input and the output matrix."""
    weights = [layer.weight for layer in (model.get_input_embeddings(), model.lm_head)]
    input_VD, output_VD = weights
    assert isinstance(input_VD, torch.Tensor)
    assert isinstance(output_VD, torch.Tensor)
    return input_VD, output_VD


def test_every_digit_is_a_token() -> None:
    """The problems are solved digit by digit; a token of several digits would hide the digits'
    positions."""
    tokenizer = train_tokenizer(iter(["It is 1212. " * 50]), 300)
    assert tokenizer.tokenize("12 1212") == ["1", "2", "Ġ1", "2", "1", "2"]
    assert len(tokenizer) <= 300 - len(SPECIAL_TOKENS)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS_TEXT, EOS_TEXT)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare_rows", [0, 3, 9])
def test_new_embeddings_start_near_the_mean(tied: bool, spare_rows: int) -> None:
    """docs/method.md, 2.4: the mean of the old embeddings plus small noise, in both matrices; the
    old ones do not change. The matrices may be tied, and may have rows without a token."""
    tokenizer = make_tokenizer()
    old_size = len(tokenizer)
    model = tiny.llama(1, vocab_size=old_size + spare_rows, hidden_size=64, tied=tied)
    with torch.no_grad():
        for index, weight in enumerate(embeddings(model)):
            weight[:old_size].add_(0.5 if tied else 1.0 + index)
    before = [weight[:old_size].detach().clone() for weight in embeddings(model)]
    add_special_tokens(model, tokenizer, seed=1)
    after = embeddings(model)
    new_rows = slice(old_size, old_size + 4)
    assert len(tokenizer) == old_size + 4
    assert model.config.vocab_size == after[0].shape[0] == after[1].shape[0] >= old_size + 4
    assert (after[0] is after[1]) == tied
    for weight, old in zip(after, before, strict=True):
        torch.testing.assert_close(weight[:old_size], old, rtol=0, atol=0)
        deviation = (weight[new_rows] - old.mean(0)) / old.std(0)
        assert deviation.abs().max() < 6 * NEW_EMBEDDING_NOISE
        assert 0.5 * NEW_EMBEDDING_NOISE < deviation.std() < 2 * NEW_EMBEDDING_NOISE
        assert torch.unique(weight[new_rows], dim=0).shape[0] == 4
    if not tied:
        noise = [w[new_rows] - old.mean(0) for w, old in zip(after, before, strict=True)]
        assert not torch.allclose(noise[0], noise[1], atol=1e-5)
    ids = [tokenizer.convert_tokens_to_ids(text) for text in SPECIAL_TOKENS]
    assert ids == list(range(old_size, old_size + 4))
    logits_BLV = model(input_ids=torch.tensor([ids])).logits
    assert logits_BLV.shape[-1] >= old_size + 4


def test_special_tokens_are_added_once() -> None:
    """A model trained from the base model already has them; adding them again would change ids."""
    tokenizer = make_tokenizer()
    model = tiny.llama(1, vocab_size=len(tokenizer))
    add_special_tokens(model, tokenizer, seed=1)
    with pytest.raises(UserError, match=r"already has.*<\|latent\|>"):
        add_special_tokens(model, tokenizer, seed=1)


def test_a_saved_model_loads_again(base_folder: Path, tmp_path: Path) -> None:
    """Load, save with the parent's tokenizer, load: the same weights and tokenizer, in evaluation
    mode."""
    model = checkpoint.load_model(base_folder)
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    checkpoint.save_model(model, tmp_path, base_folder, {"steps": 3})
    reloaded, coder = checkpoint.load_model(tmp_path), TextCoder(tmp_path)
    assert json.loads((tmp_path / "training.json").read_text("utf-8")) == {"steps": 3}
    weights, reloaded_weights = model.state_dict(), reloaded.state_dict()
    assert list(weights) == list(reloaded_weights)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, reloaded_weights[name], rtol=0, atol=0)
    assert coder.special_tokens == TextCoder(base_folder).special_tokens
    assert coder.encode("It is 12.") == TextCoder(base_folder).encode("It is 12.")
    assert checkpoint.load_model(tmp_path, "bfloat16").dtype == torch.bfloat16


def test_the_coder_reads_six_ids_and_the_context_length(base_folder: Path) -> None:
    """All later stages take the ids from it."""
    coder = TextCoder(base_folder)
    assert coder.context_length == 128
    special = coder.special_tokens
    for token, text in (
        (special.bos, BOS_TEXT), (special.eos, EOS_TEXT), (special.sol, SOL), (special.eol, EOL),
        (special.prior, PRIOR), (special.post, POST),
    ):  # fmt: skip
        assert coder.tokenizer.id_to_token(token) == text
    assert set(special.barred) == set(astuple(special)) - {special.eol}
    input_VD, _ = embeddings(checkpoint.load_model(base_folder))
    assert len(input_VD) == coder.tokenizer.get_vocab_size()


def test_a_model_without_special_tokens_is_an_error(tmp_path: Path) -> None:
    """A stage that gets the path of a foreign checkpoint must say which token it lacks."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config\.json.*no such file"):
        TextCoder(tmp_path)
    model = tiny.llama(1, vocab_size=len(tokenizer))
    checkpoint.save_model(model, tmp_path, tmp_path, {})
    with pytest.raises(UserError, match=r"lacks the special token <\|latent\|>"):
        TextCoder(tmp_path)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    """The message names the folder."""
    with pytest.raises(UserError, match=f"{tmp_path}.*config"):
        checkpoint.load_model(tmp_path)
    with pytest.raises(UserError, match="missing"):
        load_checkpoint(str(tmp_path / "missing"))


def test_hash_path_of_a_model_folder(base_folder: Path, tmp_path: Path) -> None:
    """Unfinished work is named by it: a changed weight or file name must change it."""
    model = checkpoint.load_model(base_folder)
    for folder in ("a", "b"):
        checkpoint.save_model(model, tmp_path / folder, base_folder, {})
    digest = hash_path(tmp_path / "a")
    assert hash_path(tmp_path / "b") == digest
    (tmp_path / "b" / "training.json").rename(tmp_path / "b" / "renamed.json")
    assert hash_path(tmp_path / "b") != digest
    with torch.no_grad():
        next(model.parameters()).flatten()[0].add_(1e-3)
    checkpoint.save_model(model, tmp_path / "a", base_folder, {})
    assert hash_path(tmp_path / "a") != digest


@pytest.mark.parametrize(
    "make", [tiny.sentencepiece_bpe, tiny.sentencepiece_unigram, tiny.byte_level]
)
def test_leading_spaces_are_neither_added_nor_removed(
    make: Callable[[], PreTrainedTokenizerFast],
) -> None:
    """Every text decodes to itself, also where its parts are encoded separately."""
    tokenizer = make()
    remove_leading_space(tokenizer)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    for text in ("a", " a", "  a b", "a ", ""):
        assert tokenizer.decode(encode(text)) == text
    assert tokenizer.decode([*encode("th"), *encode("e end")]) == "the end"
    unchanged = make()
    assert len(unchanged.encode("q", add_special_tokens=False)) > len(encode("q"))


def stories_checkpoint() -> Path:
    folder = tiny.SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist; this checkpoint is not part of the repository")
    return folder


def test_a_real_checkpoint_becomes_a_base_model(tmp_path: Path) -> None:
    """`base.kind: checkpoint` end to end, with tied matrices and a SentencePiece tokenizer: the
    logits of the old tokens do not change."""
    name = str(stories_checkpoint())
    base = {"kind": "checkpoint", "model": name}
    params = load(tiny.ROOT / "params.yaml") | {"base": base, "inputs": {"model": name}}
    folder, csv_path = tmp_path / "base", tmp_path / "base.csv"
    run_base(
        build_settings(BaseSettings, params),
        work=tmp_path / "work",
        out=folder,
        csv_path=csv_path,
        timing_path=tmp_path / "base.json",
    )
    coder = TextCoder(folder)
    text = "Once upon a time,\n  a naïve 猫 sat."
    assert coder.decode(coder.encode(text)) == text
    tokens = coder.encode("Once upon a time, there was a little girl named Lily. She loved to play")
    model = checkpoint.load_model(folder)
    original, _ = load_checkpoint(name)
    ids_BL = torch.tensor([[coder.special_tokens.bos, *tokens]])
    logits_BLV = model(ids_BL).logits
    torch.testing.assert_close(logits_BLV[..., :512], original(ids_BL).logits[..., :512])
    assert logits_BLV.shape[-1] >= 516
    loss = torch.nn.functional.cross_entropy(logits_BLV[0, :-1], ids_BL[0, 1:])
    assert loss < 2, "the checkpoint was trained on stories that begin like this"
    assert csv_path.read_text("utf-8") == ",".join(TRAIN_COLUMNS) + "\n"


def test_a_base_model_is_pretrained_on_its_corpus(tmp_path: Path) -> None:
    """`base.kind: pretrain` end to end, on documents of params.yaml: the loss decreases, the model
    folder is complete, and the same params give the same weights."""
    params = load(tiny.ROOT / "params.yaml")
    params["corpora"]["base"]["documents"] = 60
    params["base"] |= {"vocab_size": 300, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    params["base"] |= {"intermediate_size": 32, "context_length": 128, "sequence_length": 64}
    params["base"]["epochs"] = 2
    train = {"batch_size": 4, "precision": "float32", "optimizer": "adamw", "log_every": 1}
    params["base"]["train"] |= train
    settings = build_settings(BaseSettings, params)
    for name in ("a", "b"):
        csv_path, timing_path = tmp_path / f"{name}.csv", tmp_path / f"{name}.json"
        run_base(
            settings,
            work=tmp_path / "work",
            out=tmp_path / name,
            csv_path=csv_path,
            timing_path=timing_path,
        )
    log = read_log(tmp_path / "a.csv")
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    timings = read_timing(tmp_path / "a.json", tmp_path / "a.csv")
    assert column(timings, "step") == column(log, "step")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert hash_path(tmp_path / "a") == hash_path(tmp_path / "b")
    assert TextCoder(tmp_path / "a").context_length == 128


def test_an_unknown_kind_of_base_model_is_an_error() -> None:
    """The message names the key and the value."""
    params = load(tiny.ROOT / "params.yaml") | {"base": {"kind": "scratch"}}
    with pytest.raises(UserError, match=r"base\.kind.*'scratch'"):
        build_settings(BaseSettings, params)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sequence_length", 1000, r"sequence_length must be from 2 to context_length \(512\)"),
        ("vocab_size", 261, "vocab_size must be 262 or more"),
        ("num_layers", 0, "num_layers must be 1 or more"),
    ],
)
def test_impossible_sizes_are_an_error(key: str, value: int, message: str) -> None:
    """Before the tokenizer is trained and the corpus is packed."""
    params = load(tiny.ROOT / "params.yaml")
    params["base"][key] = value
    with pytest.raises(UserError, match=message):
        build_settings(BaseSettings, params)
