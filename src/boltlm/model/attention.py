"""Attention over short rows on a CPU in bfloat16: plain matrix products, twice as fast as torch's
fused kernel and as near to float64.

Shapes: N rows times heads, H heads, L positions, D width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

NAME = "boltlm_short"
SHORT = 512  # positions; beyond, the kernel that holds no L × L scores is faster


class PlainAttention(torch.autograd.Function):
    """softmax(q kᵀ · scale + causal mask) v. Scores and their gradients are float32, as in the
    fused kernel; rounded to bfloat16 they stray four times as far."""

    @staticmethod
    def forward(
        ctx: Any,
        query_NLD: torch.Tensor,
        key_NLD: torch.Tensor,
        value_NLD: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows, length, _ = query_NLD.shape
        mask_LL = torch.full((length, length), float("-inf")).triu(1)
        scores_NLL = torch.baddbmm(
            mask_LL.expand(rows, length, length),
            query_NLD.float(),
            key_NLD.float().transpose(1, 2),
            alpha=scale,
        )
        shares_NLL = torch.softmax(scores_NLL, -1)
        rounded_NLL = shares_NLL.to(value_NLD.dtype)
        ctx.save_for_backward(query_NLD, key_NLD, value_NLD, shares_NLL, rounded_NLL)
        ctx.scale = scale
        return torch.bmm(rounded_NLL, value_NLD)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad_NLD,) = grads
        query_NLD, key_NLD, value_NLD, shares_NLL, rounded_NLL = ctx.saved_tensors
        of_value = torch.bmm(rounded_NLL.transpose(1, 2), grad_NLD)
        of_shares = torch.bmm(grad_NLD, value_NLD.transpose(1, 2)).float()
        softmax_backward = torch.ops.aten._softmax_backward_data
        of_scores = softmax_backward(of_shares, shares_NLL, -1, torch.float32)
        of_scores = of_scores.mul_(ctx.scale).to(query_NLD.dtype)
        of_key = torch.bmm(of_scores.transpose(1, 2), query_NLD)
        return torch.bmm(of_scores, key_NLD), of_key, of_value, None


def causal(
    _module: torch.nn.Module,
    query_BHLD: torch.Tensor,
    key_BHLD: torch.Tensor,
    value_BHLD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of whole rows without padding, as transformers calls it: `*_BHLD`. Heads of keys
    and values may be shared."""
    assert attention_mask is None
    assert dropout == 0.0
    rows, heads, length, width = query_BHLD.shape
    shared = heads // key_BHLD.shape[1]
    if shared > 1:
        key_BHLD = key_BHLD.repeat_interleave(shared, 1)
        value_BHLD = value_BHLD.repeat_interleave(shared, 1)
    flat = (x.reshape(-1, length, width) for x in (query_BHLD, key_BHLD, value_BHLD))
    with torch.autocast("cpu", enabled=False):  # which would round the scores
        found: Any = PlainAttention.apply(*flat, width**-0.5 if scaling is None else scaling)
    return found.view(rows, heads, length, width).transpose(1, 2).contiguous(), None


def suits(model: PreTrainedModel, length: int, dtype: torch.dtype) -> bool:
    """Whether rows of this length are faster so, and mean the same: no GPU, no sliding window
    that is shorter, no dropout."""
    config = model.config
    window = getattr(config, "sliding_window", None) or length
    return (
        model.device.type == "cpu"
        and dtype == torch.bfloat16
        and length <= SHORT
        and window >= length
        and not getattr(config, "attention_dropout", 0.0)
        and config._attn_implementation == "sdpa"
    )


def active(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation == NAME


@contextmanager
def attention(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Have the model attend by the implementation of that name meanwhile; null: as it does."""
    before: Any = model.config._attn_implementation
    if name is not None:
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        if name is not None:
            model.set_attn_implementation(before)


AttentionInterface.register(NAME, causal)
