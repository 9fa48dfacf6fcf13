"""Next-token cross-entropy of a causal LM, a piece of the positions at a time.

Shapes: B rows, L positions, N = B·L positions, D width, V vocabulary.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from boltlm.errors import UserError
from boltlm.sequences.packing import IGNORED

LOGITS = 1 << 25  # that exist at once, in float32


class PiecewiseLoss(torch.autograd.Function):
    """Σ −log softmax(hidden · weightᵀ + bias)[target] over targets that are not IGNORED.

    The gradient is made in the forward pass, while a piece's logits are there, so that neither
    they nor their gradient are kept. Products are in `dtype`, sums in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        dtype: torch.dtype,
        logits: int,
    ) -> torch.Tensor:
        hidden, weight = hidden_ND.detach().to(dtype), weight_VD.detach().to(dtype)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = grad_bias = None
        size = max(1, logits // len(weight))
        for start in range(0, len(hidden), size):
            piece, targets = hidden[start : start + size], targets_N[start : start + size]
            known = targets != IGNORED
            index = targets.clamp(min=0)[:, None]
            logits_NV = (piece @ weight.T).float()
            if bias_V is not None:
                logits_NV += bias_V.detach().float()
            log_norm = logits_NV.logsumexp(-1, keepdim=True)
            total += ((log_norm - logits_NV.gather(1, index))[:, 0] * known).sum()
            if grad_hidden is None:
                continue
            grad_NV = logits_NV.sub_(log_norm).exp_()  # the softmax
            grad_NV.scatter_add_(1, index, torch.full_like(grad_NV[:, :1], -1.0))
            if not known.all():
                grad_NV *= known[:, None]
            if bias_V is not None:
                found = grad_NV.sum(0)
                grad_bias = found if grad_bias is None else grad_bias + found
            grad_NV = grad_NV.to(dtype)
            torch.mm(grad_NV, weight, out=grad_hidden[start : start + size])
            found = (grad_NV.T @ piece).float()
            grad_weight = found if grad_weight is None else grad_weight.add_(found)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (scale,) = grads
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        of_hidden, of_weight = ctx.dtypes
        return (
            grad_hidden.to(of_hidden).mul_(scale),
            grad_weight.to(of_weight).mul_(scale),
            None if grad_bias is None else grad_bias.to(of_weight).mul_(scale),
            None,
            None,
            None,
        )


class CausalLoss(torch.nn.Module):
    """A model whose forward is its summed loss, so that whatever shards or copies the model wraps
    this and no logits leave it."""

    def __init__(self, model: PreTrainedModel, logits: int = LOGITS) -> None:
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, inputs_BL: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        """Σ over labels that are not IGNORED, nats, float32."""
        hidden_BLD = self.model.base_model(input_ids=inputs_BL, use_cache=False).last_hidden_state
        head: Any = self.model.get_output_embeddings()
        kind = inputs_BL.device.type
        mixed = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if mixed else head.weight.dtype
        with torch.autocast(kind, enabled=False):
            total: Any = PiecewiseLoss.apply(
                hidden_BLD.flatten(0, 1),
                head.weight,
                head.bias,
                labels_BL.flatten(),
                dtype,
                self.logits,
            )
        return total


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raises UserError for a model whose logits are more than a product of hidden state and
    output matrix (scaled or capped ones), which the loss here would get wrong."""
    ids = torch.arange(8, device=model.device)[None]
    head: Any = model.get_output_embeddings()
    training, same = model.training, False
    model.eval()
    if isinstance(head, torch.nn.Linear):
        hidden_BLD = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        found, wanted = head(hidden_BLD), model(input_ids=ids, use_cache=False).logits
        same = torch.allclose(found.float(), wanted.float(), rtol=1e-3, atol=1e-3, equal_nan=True)
    model.train(training)
    if not same:
        raise UserError(
            f"{type(model).__name__}: its logits are not its hidden states times one matrix;"
            " training knows Llama, Qwen, GPT-NeoX and their like"
        )
