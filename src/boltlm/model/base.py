"""The base model: a small Llama made and pretrained here, or a checkpoint; plus four tokens."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from boltlm import engine
from boltlm.corpus.chunks import encodable
from boltlm.corpus.split import documents
from boltlm.errors import UserError
from boltlm.model import checkpoint
from boltlm.model.curve import COLUMNS
from boltlm.model.resume import Checkpoints
from boltlm.model.runs import CODE, publish
from boltlm.model.settings import TrainConfig, positive
from boltlm.model.training import train
from boltlm.params import build, section
from boltlm.sequences import packing, store
from boltlm.sequences.packing import Source, Writer, pack
from boltlm.tokens import MARKERS, TextCoder

BOS, EOS = "<|begin|>", "<|end|>"
NEW_ROW_NOISE = 0.02  # standard deviations of the old rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrain:
    """Params of `base.kind: pretrain`: sizes of the Llama, and its training on raw text."""

    kind: Literal["pretrain"]
    vocabulary: int
    width: int
    layers: int
    heads: int
    feed_forward: int
    window: int
    epochs: int
    length: int
    train: TrainConfig

    def __post_init__(self) -> None:
        positive(self, "width", "layers", "heads", "feed_forward", "epochs")
        if not 2 <= self.length <= self.window:
            raise UserError(f"length must lie within 2 and window, {self.window}: {self.length}")
        least = 256 + len(MARKERS) + 2
        if self.vocabulary < least:
            raise UserError(f"vocabulary must be {least} or more: every byte has a token")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Params of `base.kind: checkpoint`: a hub name or a path in Hugging Face format."""

    kind: Literal["checkpoint"]
    model: str


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit, with the space before it, is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(MARKERS),
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def create(config: Pretrain, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    bos, eos = (tokenizer.get_vocab()[text] for text in (BOS, EOS))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.feed_forward,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.window,
            bos_token_id=bos,
            eos_token_id=eos,
            tie_word_embeddings=False,
        )
    )


def load_checkpoint(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model and tokenizer by path or hub name; the tokenizer no longer adds a leading space."""
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"base.model '{name}' cannot be loaded: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"base.model '{name}' has no tokenizer.json (a fast tokenizer is needed)")
    without_phantom_space(tokenizer)
    config = model.config
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.bos_token_id is None:
        config.bos_token_id = tokenizer.bos_token_id
    if config.bos_token_id is None:
        config.bos_token_id = config.eos_token_id
    return model, tokenizer


def without_phantom_space(tokenizer: PreTrainedTokenizerFast) -> None:
    """Take out of a SentencePiece-style tokenizer what puts a space before every text and takes
    one away on decoding, so that chunks encoded alone decode to the document when joined."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        state[part] = _plain(state[part])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _plain(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None:
        return None
    if part["type"] == "Sequence":
        name = next(key for key in ("normalizers", "pretokenizers", "decoders") if key in part)
        kept = [plain for plain in map(_plain, part[name]) if plain is not None]
        return {**part, name: kept} if kept else None
    if part["type"] in ("Prepend", "Strip"):
        return None
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
        return {**part, "add_prefix_space": False}
    return part


def add_markers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Add SoL, EoL, Prior, Post; their rows start at the mean of the old rows plus small noise,
    in the input and in the output matrix (one and the same where they are tied)."""
    known = set(MARKERS) & set(tokenizer.get_vocab())
    if known:
        raise UserError(f"the base tokenizer already has {', '.join(sorted(known))}")
    old = len(tokenizer)
    tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    matrices = _embeddings(model)
    if len(tokenizer) > len(matrices[0]):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        matrices = _embeddings(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in matrices:
            before = weight[:old].float()
            noise = torch.randn(len(MARKERS), before.shape[1], generator=generator)
            new = before.mean(0) + NEW_ROW_NOISE * before.std(0) * noise
            weight[old : old + len(MARKERS)] = new.to(weight.dtype)


def _embeddings(model: PreTrainedModel) -> list[torch.Tensor]:
    """The input and the output matrix, once where they are tied."""
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(layer.weight): layer.weight for layer in layers}.values())


def make(params: Mapping[str, Any], work: Path, out: Path, csv_path: Path) -> None:
    """Write the base model of the section `base` to `out`, its loss curve to `csv_path` (only
    a header for a checkpoint, which is not trained here); a training is kept in `work` until
    then."""
    checkpoint.prepare_cpu()
    kind = section(params, "base.kind")
    if kind == "pretrain":
        _pretrain(params, work, out, csv_path)
    elif kind == "checkpoint":
        config = build(Checkpoint, section(params, "base"), "base")
        model, tokenizer = load_checkpoint(config.model)
        add_markers(model, tokenizer, section(params, "seed"))
        tokenizer.save_pretrained(out)
        checkpoint.save(model, out, out, {"steps": 0, "tokens": 0})
        csv_path.parent.mkdir(parents=True, exist_ok=True)
        csv_path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    else:
        raise UserError(f"params.yaml: base.kind must be pretrain | checkpoint, found {kind!r}")


def _pretrain(params: Mapping[str, Any], work: Path, out: Path, csv_path: Path) -> None:
    config = build(Pretrain, section(params, "base"), "base")
    seed = section(params, "seed")
    found = [doc for doc in documents(params, "base") if doc.text and encodable(doc.text)]
    tokenizer = train_tokenizer((document.text for document in found), config.vocabulary)
    model = create(config, tokenizer, seed)
    add_markers(model, tokenizer, seed)
    tokenizer.save_pretrained(out)
    checkpoint.save(model, out, out, {})
    coder = TextCoder(out)
    writer = Writer(
        markers=coder.markers,
        form="raw",
        layout="document",
        context_chunks=0,
        room=coder.window,
        seed=seed,
    )

    def sources(where: Path) -> list[Source]:
        named = ((document.doc_id, document.text) for document in found)
        return [Source(store.write(where / "documents", store.encoded(named, coder)), writer)]

    digest = hashlib.blake2b(digest_size=16)
    for document in found:
        digest.update(f"{document.doc_id}\0{document.text}\0".encode())
    facts = {
        "start": engine.content(out),
        "documents": digest.hexdigest(),
        "settings": [config.train.settings(), config.epochs, config.length, seed],
        "code": engine.code([*CODE, __name__]),
    }
    unfinished = work / "train" / engine.key(facts)
    with engine.alone(unfinished, "train base"):
        rows = pack(
            sources,
            unfinished,
            length=config.length,
            seed=seed,
            vocabulary=config.vocabulary,
            epochs=config.epochs,
            tokens=None,
        )
        kept = Checkpoints(unfinished, config.train.checkpoint_every, "train base")
        trained = train(
            model,
            rows,
            config.train,
            seed=seed,
            csv_path=csv_path,
            what="train base",
            kept=kept,
        )
        publish(model, trained, packing.facts(unfinished), unfinished, out, out, continual=False)
        kept.clear()
