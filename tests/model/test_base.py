"""The base model: four new tokens, folders that load again, tokenizers without a phantom space."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from boltlm import engine
from boltlm.errors import UserError
from boltlm.model import base, checkpoint
from boltlm.params import load
from boltlm.tokens import EOL, MARKERS, POST, PRIOR, SOL, TextCoder
from tests import tiny


def tokenizer() -> PreTrainedTokenizerFast:
    return base.train_tokenizer(iter(["It is 12, and 7."]), 270)


def matrices(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The input and the output matrix."""
    found = [layer.weight for layer in (model.get_input_embeddings(), model.lm_head)]
    one, other = found
    assert isinstance(one, torch.Tensor)
    assert isinstance(other, torch.Tensor)
    return one, other


def test_digits_are_tokens_of_their_own() -> None:
    """Reckoning is done digit by digit; a merge across digits would hide the places."""
    made = base.train_tokenizer(iter(["It is 1212. " * 50]), 300)
    tokens = made.tokenize("12 1212")
    assert tokens == ["1", "2", "Ġ1", "2", "1", "2"]
    assert len(made) <= 300 - len(MARKERS)
    assert (made.bos_token, made.eos_token) == (base.BOS, base.EOS)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare", [0, 3, 9])
def test_new_rows_start_near_the_mean(tied: bool, spare: int) -> None:
    """SPEC 2: the mean of the old rows plus small noise, in both matrices; old rows stay as they
    are, whether the matrices are tied and whether the checkpoint has spare rows or not."""
    words = tokenizer()
    old = len(words)
    model = tiny.llama(1, vocabulary=old + spare, width=64, tied=tied)
    with torch.no_grad():
        for number, weight in enumerate(matrices(model)):
            weight[:old].add_(0.5 if tied else 1.0 + number)
    before = [weight[:old].detach().clone() for weight in matrices(model)]
    base.add_markers(model, words, seed=1)
    new = matrices(model)
    assert len(words) == old + 4
    assert model.config.vocab_size == new[0].shape[0] == new[1].shape[0] >= old + 4
    assert (new[0] is new[1]) == tied
    for rows, was in zip(new, before, strict=True):
        torch.testing.assert_close(rows[:old], was, rtol=0, atol=0)
        away = (rows[old : old + 4] - was.mean(0)) / was.std(0)
        assert away.abs().max() < 6 * base.NEW_ROW_NOISE
        assert 0.5 * base.NEW_ROW_NOISE < away.std() < 2 * base.NEW_ROW_NOISE
        assert torch.unique(rows[old : old + 4], dim=0).shape[0] == 4
    if not tied:
        noise = [rows[old : old + 4] - was.mean(0) for rows, was in zip(new, before, strict=True)]
        assert not torch.allclose(noise[0], noise[1], atol=1e-5)
    assert [words.convert_tokens_to_ids(marker) for marker in MARKERS] == list(range(old, old + 4))
    logits = model(input_ids=torch.tensor([[old, old + 1, old + 2, old + 3]])).logits
    assert logits.shape[-1] >= old + 4


def test_markers_are_added_once() -> None:
    """A model that descends from the base already has them; twice would be other ids."""
    words = tokenizer()
    model = tiny.llama(1, vocabulary=len(words))
    base.add_markers(model, words, seed=1)
    with pytest.raises(UserError, match=r"already has.*<\|latent\|>"):
        base.add_markers(model, words, seed=1)


def test_a_base_folder_loads_again(base_folder: Path, tmp_path: Path) -> None:
    """Save, load, save from a parent: the same weights, tokenizer and logits, in eval mode."""
    model = checkpoint.load(base_folder)
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    checkpoint.save(model, tmp_path, base_folder, {"steps": 3})
    again, coder = checkpoint.load(tmp_path), TextCoder(tmp_path)
    assert json.loads((tmp_path / "training.json").read_text("utf-8")) == {"steps": 3}
    for (name, one), (other, two) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert coder.markers == TextCoder(base_folder).markers
    assert coder.encode("It is 12.") == TextCoder(base_folder).encode("It is 12.")
    assert checkpoint.load(tmp_path, "bfloat16").dtype == torch.bfloat16


def test_the_coder_knows_six_ids_and_the_window(base_folder: Path) -> None:
    """Everything downstream takes the ids from here."""
    coder = TextCoder(base_folder)
    assert coder.window == 128
    m = coder.markers
    for token, text in (
        (m.bos, base.BOS), (m.eos, base.EOS), (m.sol, SOL), (m.eol, EOL), (m.prior, PRIOR),
        (m.post, POST),
    ):  # fmt: skip
        assert coder.tokenizer.id_to_token(token) == text
    assert set(m.forbidden) == {m.bos, m.sol, m.prior, m.post}
    rows, _ = matrices(checkpoint.load(base_folder))
    assert len(rows) == coder.tokenizer.get_vocab_size()


def test_a_folder_without_markers_is_an_error(tmp_path: Path) -> None:
    """A stage pointed at a foreign checkpoint must say that it lacks the tokens."""
    words = tokenizer()
    words.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config\.json.*no such file"):
        TextCoder(tmp_path)
    model = tiny.llama(1, vocabulary=len(words))
    checkpoint.save(model, tmp_path, tmp_path, {})
    with pytest.raises(UserError, match=r"lacks the special token <\|latent\|>"):
        TextCoder(tmp_path)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    """Names the folder and what should have made it."""
    with pytest.raises(UserError, match=f"{tmp_path}.*config"):
        checkpoint.load(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        base.load_checkpoint(str(tmp_path / "nowhere"))


def test_content_names_a_folder_by_what_is_in_it(base_folder: Path, tmp_path: Path) -> None:
    """Work is remembered under this name: a changed weight or file name must change it."""
    model = checkpoint.load(base_folder)
    for folder in ("a", "b"):
        checkpoint.save(model, tmp_path / folder, base_folder, {})
    first = engine.content(tmp_path / "a")
    assert engine.content(tmp_path / "b") == first
    (tmp_path / "b" / "training.json").rename(tmp_path / "b" / "renamed.json")
    assert engine.content(tmp_path / "b") != first
    with torch.no_grad():
        next(model.parameters()).flatten()[0].add_(1e-3)
    checkpoint.save(model, tmp_path / "a", base_folder, {})
    assert engine.content(tmp_path / "a") != first


@pytest.mark.parametrize(
    "made", [tiny.sentencepiece_bpe, tiny.sentencepiece_unigram, tiny.byte_level]
)
def test_without_phantom_space(made: Callable[[], PreTrainedTokenizerFast]) -> None:
    """What adds a space before every text, or takes one away, is gone; nothing else is."""
    words = made()
    base.without_phantom_space(words)

    def ids(text: str) -> list[int]:
        return words.encode(text, add_special_tokens=False)

    for text in ("a", " a", "  a b", "a ", ""):
        assert words.decode(ids(text)) == text
    assert words.decode([*ids("th"), *ids("e end")]) == "the end"
    added = made()
    assert len(added.encode("q", add_special_tokens=False)) > len(ids("q"))


def stories() -> Path:
    folder = tiny.SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; this checkpoint is not part of the repository")
    return folder


def test_a_real_checkpoint_becomes_a_base_model(tmp_path: Path) -> None:
    """`base.kind: checkpoint` end to end: tied matrices, SentencePiece, spare rows or not; on
    the old tokens the model says what it said."""
    params = {"seed": 1, "base": {"kind": "checkpoint", "model": str(stories())}}
    base.make(params, tmp_path / "work", tmp_path / "base", tmp_path / "base.csv")
    coder = TextCoder(tmp_path / "base")
    odd = "Once upon a time,\n  a naïve 猫 sat."
    assert coder.decode(coder.encode(odd)) == odd
    tokens = coder.encode("Once upon a time, there was a little girl named Lily. She loved to play")
    model = checkpoint.load(tmp_path / "base")
    original, _ = base.load_checkpoint(str(stories()))
    ids = torch.tensor([[coder.markers.bos, *tokens]])
    torch.testing.assert_close(model(ids).logits[..., :512], original(ids).logits[..., :512])
    assert model(ids).logits.shape[-1] >= 516
    loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    assert loss < 2, "a trained model knows its stories' first sentence"
    assert (tmp_path / "base.csv").read_text("utf-8").startswith("step,tokens,loss")


def test_a_base_model_is_pretrained_on_its_corpus(tmp_path: Path) -> None:
    """`base.kind: pretrain` end to end, on the pages of params.yaml: the loss falls, the folder
    is whole, and the same params give the same weights."""
    params = load(tiny.ROOT / "params.yaml")
    params["corpora"]["base"]["documents"] = 60
    small = {"vocabulary": 300, "width": 16, "layers": 1, "heads": 2, "feed_forward": 32}
    short = {"batch_rows": 4, "precision": "float32", "optimizer": "adamw", "log_every": 1}
    params["base"] |= {**small, "window": 128, "length": 64, "epochs": 2}
    params["base"]["train"] |= short
    for name in ("one", "two"):
        base.make(params, tmp_path / "work", tmp_path / name, tmp_path / f"{name}.csv")
    lines = (tmp_path / "one.csv").read_text("utf-8").splitlines()[1:]
    losses = [float(line.split(",")[2]) for line in lines]
    assert losses[-1] < losses[0] - 0.3
    assert engine.content(tmp_path / "one") == engine.content(tmp_path / "two")
    assert TextCoder(tmp_path / "one").window == 128


def test_an_unknown_kind_of_base_is_named(tmp_path: Path) -> None:
    """A typing mistake in params.yaml."""
    with pytest.raises(UserError, match=r"base\.kind.*'scratch'"):
        base.make({"seed": 1, "base": {"kind": "scratch"}}, tmp_path, tmp_path, tmp_path / "a.csv")
