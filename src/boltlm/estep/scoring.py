"""Log-probabilities of given token ids (docs/method.md, section 4.1), from float32 logits.

Shapes: B batch rows, L positions, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from boltlm.estep.kv_cache import batch_by_length, prefill
from boltlm.sequences.layouts import TokenIds
from boltlm.tokens import SpecialTokens

LOGIT_POSITIONS = 8192  # positions whose logits are in memory at once


@torch.inference_mode()
def token_log_probs(
    model: PreTrainedModel,
    prefixes: Sequence[TokenIds],
    branches: Sequence[Sequence[TokenIds]],
    batch_tokens: int,
    barred: Sequence[int] = (),
    temperature: float = 1.0,
) -> list[list[np.ndarray]]:
    """log p(token | prefix, preceding tokens) for every token of every branch, in nats.

    `branches[i]` are the continuations of `prefixes[i]`; the result has the same nesting, with a
    float64 array of shape (length of the branch,) for each. A prefix has at least one token, a
    branch may be empty. The branches of a prefix share its key–value cache, and equal branches are
    scored once. `batch_tokens`: maximum number of tokens in a batch. `barred`: tokens that have
    probability 0, the others being renormalised; no branch contains one. `temperature` divides the
    logits.
    """
    unique = [sorted({tuple(branch) for branch in group if branch}) for group in branches]
    max_lengths = [max(map(len, group), default=0) for group in unique]
    lengths = [len(p) + added for p, added in zip(prefixes, max_lengths, strict=True)]
    nonempty = [index for index, group in enumerate(unique) if group]
    scores: list[dict[tuple[int, ...], np.ndarray]] = [{(): np.zeros(0)} for _ in prefixes]
    for batch in batch_by_length(
        [lengths[i] for i in nonempty], [len(unique[i]) for i in nonempty], batch_tokens
    ):
        indices = [nonempty[i] for i in batch]
        rows = [(i, branch) for i in indices for branch in unique[i]]
        log_probs_BL = _score_batch(
            model,
            [prefixes[i] for i in indices],
            [unique[i] for i in indices],
            barred,
            temperature,
        )
        for (index, branch), log_probs_L in zip(rows, log_probs_BL, strict=True):
            scores[index][branch] = log_probs_L
    return [
        [by_branch[tuple(branch)] for branch in group]
        for by_branch, group in zip(scores, branches, strict=True)
    ]


def _score_batch(
    model: PreTrainedModel,
    prefixes: list[TokenIds],
    groups: list[list[tuple[int, ...]]],
    barred: Sequence[int],
    temperature: float,
) -> list[np.ndarray]:
    """Cache each prefix without its last token, then run that token and the branch after it."""
    device = model.device
    prefix_rows = [row for row, group in enumerate(groups) for _ in group]
    branches = [branch for group in groups for branch in group]
    max_length = max(map(len, branches))
    inputs_BL = torch.zeros(len(branches), max_length, dtype=torch.long)
    targets_BL = torch.zeros_like(inputs_BL)
    for row, (prefix_row, branch) in enumerate(zip(prefix_rows, branches, strict=True)):
        inputs_BL[row, : len(branch)] = torch.as_tensor([prefixes[prefix_row][-1], *branch[:-1]])
        targets_BL[row, : len(branch)] = torch.as_tensor(branch)
    inputs_BL, targets_BL = inputs_BL.to(device), targets_BL.to(device)
    heads = [list(prefix[:-1]) for prefix in prefixes]
    arguments: dict[str, Any] = {}
    past_lengths_B1 = torch.tensor([[len(heads[row])] for row in prefix_rows], device=device)
    if any(heads):
        _, cache, mask_BL = prefill(model, heads, DynamicLayer)
        order = torch.tensor(prefix_rows, device=device)
        cache.batch_select_indices(order)
        arguments["past_key_values"] = cache
        arguments["attention_mask"] = torch.cat([mask_BL[order], torch.ones_like(inputs_BL)], 1)
    hidden_BLD = model.base_model(
        input_ids=inputs_BL,
        position_ids=past_lengths_B1 + torch.arange(max_length, device=device),
        use_cache=bool(arguments),
        **arguments,
    ).last_hidden_state
    log_probs = target_log_probs(model, hidden_BLD, targets_BL, barred, temperature)
    log_probs_BL = log_probs.double().cpu().numpy()
    return [log_probs_BL[row, : len(branch)] for row, branch in enumerate(branches)]


def target_log_probs(
    model: PreTrainedModel,
    hidden_BLD: torch.Tensor,
    targets_BL: torch.Tensor,
    barred: Sequence[int],
    temperature: float,
) -> torch.Tensor:
    """Log-probabilities of the targets, shape (B, L), from the last hidden states, when logits are
    divided by `temperature` and the tokens `barred` have probability 0. The logits are computed
    for LOGIT_POSITIONS positions at a time, which bounds their memory."""
    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has an output layer"
    barred_ids = torch.tensor(barred, dtype=torch.long, device=hidden_BLD.device)
    flat_hidden, flat_targets = hidden_BLD.flatten(0, 1), targets_BL.flatten()
    parts = [
        head(flat_hidden[i : i + LOGIT_POSITIONS])
        .float()
        .div_(temperature)
        .index_fill_(1, barred_ids, -torch.inf)
        .log_softmax(-1)
        .gather(1, flat_targets[i : i + LOGIT_POSITIONS, None])[:, 0]
        for i in range(0, len(flat_targets), LOGIT_POSITIONS)
    ]
    return torch.cat(parts).view(targets_BL.shape)


def proposal_log_probs(
    model: PreTrainedModel,
    special: SpecialTokens,
    prompts: Sequence[TokenIds],
    latents: Sequence[Sequence[TokenIds]],
    *,
    max_latent_tokens: int,
    batch_tokens: int,
    temperature: float = 1.0,
) -> list[list[float]]:
    """log q′(Z, EoL | prompt) of the latents of each prompt, eq. (1), in nats: special tokens are
    barred, and EoL has probability 1 behind a latent of `max_latent_tokens` tokens."""
    branches = [
        [(*z, special.eol) if len(z) < max_latent_tokens else tuple(z) for z in group]
        for group in latents
    ]
    scores = token_log_probs(model, prompts, branches, batch_tokens, special.barred, temperature)
    return [[float(log_probs_L.sum()) for log_probs_L in group] for group in scores]
