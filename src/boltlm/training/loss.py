"""Next-token cross-entropy of a causal LM, computed over chunks of positions to save memory.

Shapes: B sequences, L positions, N = B·L positions, C of them in a chunk, D hidden size,
V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from boltlm.errors import UserError
from boltlm.sequences.packing import IGNORE_INDEX

MAX_LOGITS = 1 << 25  # float32 logits in memory at once


class ChunkedCrossEntropy(torch.autograd.Function):
    """Σ −log softmax(hidden · weightᵀ + bias)[target] over targets other than IGNORE_INDEX, each
    multiplied by its loss weight (None: 1).

    The gradient is computed in the forward pass while the logits of a chunk exist, so neither
    logits nor their gradient are kept. Matrix products are in `dtype`, sums in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        loss_weights_N: torch.Tensor | None,
        dtype: torch.dtype,
        max_logits: int,
    ) -> torch.Tensor:
        rounded_ND, rounded_VD = hidden_ND.detach().to(dtype), weight_VD.detach().to(dtype)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = torch.zeros((), device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(rounded_ND) if needs_grad else None
        grad_weight_VD = grad_bias_V = None
        size = max(1, max_logits // len(rounded_VD))
        for start in range(0, len(rounded_ND), size):
            chunk = slice(start, start + size)
            hidden_CD = rounded_ND[chunk]
            loss_weights_C = None if loss_weights_N is None else loss_weights_N[chunk]
            loss, grad_CV = _chunk_loss(
                hidden_CD, rounded_VD, bias_V, targets_N[chunk], loss_weights_C, needs_grad
            )
            total += loss
            if grad_CV is None or grad_hidden_ND is None:
                continue
            if bias_V is not None:
                chunk_grad_V = grad_CV.sum(0)
                grad_bias_V = chunk_grad_V if grad_bias_V is None else grad_bias_V + chunk_grad_V
            grad_CV = grad_CV.to(dtype)
            torch.mm(grad_CV, rounded_VD, out=grad_hidden_ND[chunk])
            chunk_grad_VD = (grad_CV.T @ hidden_CD).float()
            grad_weight_VD = (
                chunk_grad_VD if grad_weight_VD is None else grad_weight_VD.add_(chunk_grad_VD)
            )
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (scale,) = grads
        grad_hidden_ND, grad_weight_VD, grad_bias_V = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            grad_hidden_ND.to(hidden_dtype).mul_(scale),
            grad_weight_VD.to(weight_dtype).mul_(scale),
            None if grad_bias_V is None else grad_bias_V.to(weight_dtype).mul_(scale),
            None,
            None,
            None,
            None,
        )


def _chunk_loss(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_C: torch.Tensor,
    loss_weights_C: torch.Tensor | None,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The summed loss of a chunk and, if needed, its gradient with respect to the logits."""
    has_target_C = targets_C != IGNORE_INDEX
    factors_C = has_target_C if loss_weights_C is None else has_target_C * loss_weights_C
    index_C1 = targets_C.clamp(min=0)[:, None]
    logits_CV = (hidden_CD @ weight_VD.T).float()
    if bias_V is not None:
        logits_CV += bias_V.detach().float()
    log_norm_C1 = logits_CV.logsumexp(-1, keepdim=True)
    loss = ((log_norm_C1 - logits_CV.gather(1, index_C1))[:, 0] * factors_C).sum()
    if not needs_grad:
        return loss, None
    grad_CV = logits_CV.sub_(log_norm_C1).exp_()  # the softmax
    grad_CV.scatter_add_(1, index_C1, torch.full_like(grad_CV[:, :1], -1.0))
    if loss_weights_C is not None or not has_target_C.all():
        grad_CV *= factors_C[:, None]
    return loss, grad_CV


class CausalLMLoss(torch.nn.Module):
    """A causal LM whose forward pass returns its summed loss. DDP and FSDP wrap this module, so
    that logits never leave it. `max_logits`: float32 logits in memory at once."""

    def __init__(self, model: PreTrainedModel, max_logits: int = MAX_LOGITS) -> None:
        super().__init__()
        self.model, self.max_logits = model, max_logits

    def forward(
        self,
        inputs_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        weights_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss summed over all labels other than IGNORE_INDEX, each multiplied by its weight
        where there are weights: a scalar, nats, float32."""
        hidden_BLD = self.model.base_model(input_ids=inputs_BL, use_cache=False).last_hidden_state
        head: Any = self.model.get_output_embeddings()
        device_type = inputs_BL.device.type
        mixed = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if mixed else head.weight.dtype
        with torch.autocast(device_type, enabled=False):
            total: Any = ChunkedCrossEntropy.apply(
                hidden_BLD.flatten(0, 1),
                head.weight,
                head.bias,
                labels_BL.flatten(),
                None if weights_BL is None else weights_BL.flatten(),
                dtype,
                self.max_logits,
            )
        return total


@torch.no_grad()
def check_output_head(model: PreTrainedModel) -> None:
    """Raises UserError for a model whose logits are not just the product of the hidden state and
    the output matrix (but scaled or capped, say): the loss of this module would be wrong."""
    ids_BL = torch.arange(8, device=model.device)[None]
    head: Any = model.get_output_embeddings()
    was_training, matches = model.training, False
    model.eval()
    if isinstance(head, torch.nn.Linear):
        hidden_BLD = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
        product_BLV = head(hidden_BLD).float()
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits.float()
        matches = torch.allclose(product_BLV, logits_BLV, rtol=1e-3, atol=1e-3, equal_nan=True)
    model.train(was_training)
    if not matches:
        raise UserError(
            f"{type(model).__name__}: its logits are not its hidden states times one matrix;"
            " training supports Llama, Qwen, GPT-NeoX and similar architectures"
        )


def model_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by their names in the model, from those in the CausalLMLoss around it."""
    return {name.removeprefix("model."): weight for name, weight in weights.items()}
