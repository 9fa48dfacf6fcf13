"""The base model before training: a new Llama or a checkpoint, extended by the special tokens."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from boltlm.checkpoint import require_all_weights
from boltlm.corpus.readers import split_revision
from boltlm.errors import UserError
from boltlm.tokens import SPECIAL_TOKENS
from boltlm.training.config import PretrainConfig
from boltlm.training.tokenizer import BOS_TEXT, EOS_TEXT, remove_leading_space

NEW_EMBEDDING_NOISE = 0.02  # in standard deviations of the old embeddings


def create_model(
    config: PretrainConfig, tokenizer: PreTrainedTokenizerFast, seed: int
) -> PreTrainedModel:
    """A Llama with random weights for the vocabulary of `tokenizer`."""
    torch.manual_seed(seed)
    bos, eos = (tokenizer.get_vocab()[text] for text in (BOS_TEXT, EOS_TEXT))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=config.context_length,
            bos_token_id=bos,
            eos_token_id=eos,
            tie_word_embeddings=False,
        )
    )


def load_checkpoint(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model and tokenizer by path or hub name, which may end in `@<revision>`. The tokenizer no
    longer adds a leading space.

    Raises UserError where they cannot be loaded or the tokenizer is not a fast one.
    """
    logging.disable_progress_bar()
    path, revision = (name, None) if Path(name).exists() else split_revision(name)
    arguments = {"revision": revision} if revision else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **arguments)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **arguments
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"base.model '{name}' cannot be loaded: {reason}") from error
    model, report = loaded
    require_all_weights(f"base.model '{name}'", report)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"base.model '{name}' has no tokenizer.json; a model with a fast tokenizer is needed"
        )
    remove_leading_space(tokenizer)
    config = model.config
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.bos_token_id is None:
        config.bos_token_id = tokenizer.bos_token_id
    if config.bos_token_id is None:
        config.bos_token_id = config.eos_token_id
    return model, tokenizer


def add_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    """Add SoL, EoL, Prior and Post to the tokenizer and to the model (docs/method.md, 2.4).

    Their embeddings start at the mean of the old ones plus small noise, in the input and in the
    output matrix (a single matrix where they are tied). Raises UserError for a tokenizer that
    already has them.
    """
    existing = set(SPECIAL_TOKENS) & set(tokenizer.get_vocab())
    if existing:
        raise UserError(
            f"the tokenizer of the base model already has {', '.join(sorted(existing))}; use a"
            " checkpoint without these tokens"
        )
    old_size = len(tokenizer)
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    matrices = _embedding_matrices(model)
    if len(tokenizer) > len(matrices[0]):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        matrices = _embedding_matrices(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight_VD in matrices:
            old_VD = weight_VD[:old_size].float()
            noise = torch.randn(len(SPECIAL_TOKENS), old_VD.shape[1], generator=generator)
            new = old_VD.mean(0) + NEW_EMBEDDING_NOISE * old_VD.std(0) * noise
            weight_VD[old_size : old_size + len(SPECIAL_TOKENS)] = new.to(weight_VD.dtype)


def _embedding_matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    """The input and the output embedding matrix; only one where they are tied."""
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(layer.weight): layer.weight for layer in layers}.values())
