"""Tiny things made by real code: a Llama of nine tokens, a base model folder, settings."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from boltlm.corpus import generated, sources
from boltlm.model.schedules import Schedule
from boltlm.model.settings import TrainConfig
from boltlm.params import build, load
from boltlm.sampling.estep import SamplingConfig
from boltlm.seeds import generator
from boltlm.sequences.packing import Rows
from boltlm.tokens import EOL, MARKERS, POST, PRIOR, SOL, Markers, TextCoder

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
BOS, EOS = "<|begin|>", "<|end|>"

# Ordinary tokens and special ones are mixed, and EoL is 0, which padding also is.
ORDINARY = (1, 4, 7)
VOCABULARY = {EOL: 0, "a": 1, BOS: 2, SOL: 3, "b": 4, EOS: 5, POST: 6, "c": 7, PRIOR: 8}
WINDOW = 64


@dataclass(frozen=True)
class Tiny:
    """A model whose latents can be enumerated, and its coder."""

    model: LlamaForCausalLM
    coder: TextCoder

    @property
    def markers(self) -> Markers:
        return self.coder.markers


def llama(seed: int, *, vocabulary: int, width: int = 8, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            bos_token_id=VOCABULARY[BOS],
            eos_token_id=VOCABULARY[EOS],
            tie_word_embeddings=tied,
        )
    ).eval()


def enumerable(folder: Path) -> Tiny:
    """Weights so large that distributions are far from uniform and hang on the whole prompt;
    three draws in four end with EoL within a few tokens, the others in every other way."""
    model = llama(5, vocabulary=len(VOCABULARY))
    favoured = [*ORDINARY, VOCABULARY[EOL]]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20)
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.lm_head.weight[:, 0] = -1.0
        model.lm_head.weight[favoured, 0] = 1.0
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tiny(model, TextCoder(folder))


def coder_folder(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """A folder that a TextCoder can read: the tokenizer with the four special tokens."""
    tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    tokenizer.save_pretrained(folder)
    config = {
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """As Llama's: a space is put before every text and taken away on decoding."""
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("▁▁", "▁▁")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁abcdefghijklmnopqrstuvwxyz.!?,", *("".join(merge) for merge in merges)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    state["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, space],
    }
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    state["decoder"] = {
        "type": "Sequence",
        "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
    }
    return _wrapped(Tokenizer.from_str(json.dumps(state)))


def sentencepiece_unigram() -> PreTrainedTokenizerFast:
    """A Unigram model whose Metaspace puts a space before every text."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(piece, -3.0 - index / 50) for index, piece in enumerate("▁etaoinshrdlu.")]
    pieces += [("▁the", -2.0), ("▁a", -2.5), ("ing", -2.7), ("▁▁", -2.9)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    state["pre_tokenizer"] = space
    state["decoder"] = {
        "type": "Sequence",
        "decoders": [{"type": "ByteFallback"}, space],
    }
    return _wrapped(Tokenizer.from_str(json.dumps(state)))


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges, as GPT-2's but smaller; it also adds a space before."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    level = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer = level  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def schedule(**changes: Any) -> Schedule:
    values: dict[str, Any] = {
        "kind": "cosine",
        "warmup": 0.2,
        "decay_fraction": 0.15,
        "least_ratio": 0.1,
    }
    return Schedule(**{**values, **changes})


def train_config(**changes: Any) -> TrainConfig:
    """AdamW in float32; `changes` name other fields."""
    values: dict[str, Any] = {
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "beta1": 0.9,
        "beta2": 0.95,
        "epsilon": 1e-8,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "batch_rows": 3,
        "precision": "float32",
        "micro_rows": None,
        "activation_checkpointing": False,
        "compile": False,
        "schedule": schedule(),
        "log_every": 1,
        "checkpoint_every": 1000,
        "evaluate": None,
        "live": False,
    }
    return TrainConfig(**{**values, **changes})


def rows(stream: np.ndarray, length: int, seed: int) -> Rows:
    """The training rows of a stream in memory."""
    count = -(-(len(stream) - 1) // length)
    order = generator(seed, "rows").permutation(count)
    return Rows(stream, length, order, "tests")


def sampling_config(**changes: Any) -> SamplingConfig:
    """The section `sampling` of params.yaml, with `changes`."""
    values = load(ROOT / "params.yaml")["sampling"] | changes
    return build(SamplingConfig, values, "sampling")


def pages(**changes: Any) -> generated.Generated:
    """The generated source of params.yaml, with `changes`."""
    source = sources.resolve(load(ROOT / "params.yaml"), changes, "tests")
    assert isinstance(source, generated.Generated)
    return source
