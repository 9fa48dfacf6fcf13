"""Small inputs for tests: a Llama with nine tokens, tokenizers, settings, a packed dataset."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from boltlm.corpus.generated import GeneratedSource
from boltlm.estep.config import SamplingConfig
from boltlm.param_values import build
from boltlm.params import load
from boltlm.seeds import generator
from boltlm.sequences.packing import PackedDataset
from boltlm.tokens import EOL, POST, PRIOR, SOL, SPECIAL_TOKENS, SpecialTokens, TextCoder
from boltlm.training.config import TrainConfig
from boltlm.training.schedules import ScheduleConfig

ROOT = Path(__file__).resolve().parent.parent
# The prompts that params.yaml names.
TEMPLATES = ROOT / "src" / "boltlm" / "teachers" / "templates"
FEWSHOT = ROOT / "src" / "boltlm" / "evaluation" / "fewshot.yaml"
SHARED = ROOT.parent / "shared" / "data"
BOS, EOS = "<|begin|>", "<|end|>"

# Ordinary and special ids are interleaved, and EoL has the id 0, as padding has.
ORDINARY = (1, 4, 7)
VOCAB = {EOL: 0, "a": 1, BOS: 2, SOL: 3, "b": 4, EOS: 5, POST: 6, "c": 7, PRIOR: 8}
CONTEXT_LENGTH = 64


@dataclass(frozen=True)
class Tiny:
    """A model with so few tokens that all its latents can be enumerated, and its coder."""

    model: LlamaForCausalLM
    coder: TextCoder

    @property
    def special_tokens(self) -> SpecialTokens:
        return self.coder.special_tokens


def llama(
    seed: int, *, vocab_size: int, hidden_size: int = 8, tied: bool = False
) -> LlamaForCausalLM:
    """A Llama of two layers with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=VOCAB[BOS],
            eos_token_id=VOCAB[EOS],
            tie_word_embeddings=tied,
        )
    ).eval()


def enumerable(folder: Path) -> Tiny:
    """A model folder whose weights are so large that every distribution is far from uniform and
    depends on the complete prompt. Three draws in four end with EoL within a few tokens; among the
    others, every other way of ending occurs."""
    model = llama(5, vocab_size=len(VOCAB))
    likely = [*ORDINARY, VOCAB[EOL]]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20)
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.lm_head.weight[:, 0] = -1.0
        model.lm_head.weight[likely, 0] = 1.0
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tiny(model, TextCoder(folder))


def without_entries(params: dict[str, Any]) -> dict[str, Any]:
    """Params without teachers, latents, models, curves and runs, so that a test can name its own
    and none is left that refers to others."""
    finetune = params["finetune"] | {"runs": {}}
    return params | {
        "teachers": {},
        "latents": {},
        "models": {},
        "curves": {},
        "finetune": finetune,
    }


def raw_entry(corpus: str) -> dict[str, Any]:
    """An entry of `models` trained on raw text."""
    entry = {"parent": "base", "corpus": corpus, "data": f"split/{corpus}", "format": "raw"}
    return {**entry, "mix_corpus": corpus}


def coder_folder(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """A folder that a TextCoder can read: the tokenizer with the four special tokens."""
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    tokenizer.save_pretrained(folder)
    config = {
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """A BPE like Llama's: a space is put before every text and removed when decoding."""
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("▁▁", "▁▁")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁abcdefghijklmnopqrstuvwxyz.!?,", *("".join(merge) for merge in merges)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    state["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, space],
    }
    restore_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    state["decoder"] = {
        "type": "Sequence",
        "decoders": [restore_space, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
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
    """A byte-level BPE without merges, like GPT-2's; it also puts a space before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    byte_level_split = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer = byte_level_split  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def schedule(**changes: Any) -> ScheduleConfig:
    """A cosine schedule; `changes` replace fields."""
    values: dict[str, Any] = {
        "kind": "cosine",
        "warmup": 0.2,
        "decay_fraction": 0.15,
        "min_lr_ratio": 0.1,
    }
    return ScheduleConfig(**{**values, **changes})


def train_config(**changes: Any) -> TrainConfig:
    """AdamW in float32; `changes` replace fields."""
    values: dict[str, Any] = {
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "batch_size": 3,
        "precision": "float32",
        "micro_batch_size": None,
        "activation_checkpointing": False,
        "compile": False,
        "schedule": schedule(),
        "log_every": 1,
        "checkpoint_every": 1000,
        "validation": None,
        "log_live": False,
    }
    return TrainConfig(**{**values, **changes})


def rows(stream: np.ndarray, sequence_length: int, seed: int) -> PackedDataset:
    """The training sequences of a stream that is held in memory."""
    num_sequences = -(-(len(stream) - 1) // sequence_length)
    order = generator(seed, "rows").permutation(num_sequences)
    return PackedDataset(stream, sequence_length, order, "tests")


def sampling_config(**changes: Any) -> SamplingConfig:
    """The section `sampling` of params.yaml; `changes` replace keys."""
    return build(SamplingConfig, load(ROOT / "params.yaml")["sampling"] | changes, "sampling")


def latents_entry(model: str, **changes: Any) -> dict[str, Any]:
    """An entry of `latents` for the corpus `em`; `changes` replace keys."""
    values: dict[str, Any] = {
        "model": model,
        "corpus": "em",
        "k_samples": None,
        "previous": "chunks/em",
        "previous_model": model,
        "estep": {},
    }
    return values | changes


def pages(**changes: Any) -> GeneratedSource:
    """The generated source of params.yaml; `changes` replace keys."""
    return build(GeneratedSource, load(ROOT / "params.yaml")["corpus"] | changes, "corpus")
