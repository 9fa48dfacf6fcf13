"""Exact log-probabilities of given token ids, from float32 logits.

Shapes: B rows, L positions, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from boltlm.sampling.cache import length_batches, prefill
from boltlm.sequences.layouts import Ids

LOGIT_POSITIONS = 8192  # logits exist for no more positions than these at once


@torch.inference_mode()
def token_log_probs(
    model: PreTrainedModel,
    prefixes: Sequence[Ids],
    branches: Sequence[Sequence[Ids]],
    batch_tokens: int,
) -> list[list[np.ndarray]]:
    """log p(token | prefix, tokens before it) for every token of every branch, float64, nats.

    A prefix has at least one token, a branch may be empty. The branches of a prefix share its
    key–value cache, and those that are the same are scored once.
    """
    kinds = [sorted({tuple(branch) for branch in group if branch}) for group in branches]
    longest = [max(map(len, group), default=0) for group in kinds]
    lengths = [len(p) + more for p, more in zip(prefixes, longest, strict=True)]
    asked = [index for index, group in enumerate(kinds) if group]
    found: list[dict[tuple[int, ...], np.ndarray]] = [{(): np.zeros(0)} for _ in prefixes]
    for batch in length_batches(
        [lengths[i] for i in asked], [len(kinds[i]) for i in asked], batch_tokens
    ):
        places = [asked[index] for index in batch]
        flat = [(i, branch) for i in places for branch in kinds[i]]
        scored = _batch(model, [prefixes[i] for i in places], [kinds[i] for i in places])
        for (index, branch), logs in zip(flat, scored, strict=True):
            found[index][branch] = logs
    return [
        [known[tuple(branch)] for branch in group]
        for known, group in zip(found, branches, strict=True)
    ]


def _batch(
    model: PreTrainedModel, prefixes: list[Ids], groups: list[list[tuple[int, ...]]]
) -> list[np.ndarray]:
    """The prefix but its last token is cached; that token and the branch run behind it."""
    device = model.device
    owners = [place for place, group in enumerate(groups) for _ in group]
    branches = [branch for group in groups for branch in group]
    most = max(map(len, branches))
    inputs_BL = torch.zeros(len(branches), most, dtype=torch.long)
    targets_BL = torch.zeros_like(inputs_BL)
    for row, (owner, branch) in enumerate(zip(owners, branches, strict=True)):
        inputs_BL[row, : len(branch)] = torch.as_tensor([prefixes[owner][-1], *branch[:-1]])
        targets_BL[row, : len(branch)] = torch.as_tensor(branch)
    inputs_BL, targets_BL = inputs_BL.to(device), targets_BL.to(device)
    heads = [list(prefix[:-1]) for prefix in prefixes]
    arguments: dict[str, Any] = {}
    before_B1 = torch.tensor([[len(heads[owner])] for owner in owners], device=device)
    if any(heads):
        _, cache, mask_BL = prefill(model, heads, DynamicLayer)
        order = torch.tensor(owners, device=device)
        cache.batch_select_indices(order)
        arguments["past_key_values"] = cache
        arguments["attention_mask"] = torch.cat([mask_BL[order], torch.ones_like(inputs_BL)], 1)
    hidden_BLD = model.base_model(
        input_ids=inputs_BL,
        position_ids=before_B1 + torch.arange(most, device=device),
        use_cache=bool(arguments),
        **arguments,
    ).last_hidden_state
    logs_BL = target_log_probs(model, hidden_BLD, targets_BL).double().cpu().numpy()
    return [logs_BL[row, : len(branch)] for row, branch in enumerate(branches)]


def target_log_probs(
    model: PreTrainedModel, hidden_BLD: torch.Tensor, targets_BL: torch.Tensor
) -> torch.Tensor:
    """log-softmax of the output layer at the targets, a fixed number of positions at a time."""
    head = model.get_output_embeddings()
    assert head is not None, "a causal LM has an output layer"
    flat_hidden, flat_targets = hidden_BLD.flatten(0, 1), targets_BL.flatten()
    pieces = [
        head(flat_hidden[i : i + LOGIT_POSITIONS])
        .float()
        .log_softmax(-1)
        .gather(1, flat_targets[i : i + LOGIT_POSITIONS, None])[:, 0]
        for i in range(0, len(flat_targets), LOGIT_POSITIONS)
    ]
    return torch.cat(pieces).view(targets_BL.shape)
