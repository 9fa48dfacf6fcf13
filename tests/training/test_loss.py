"""The chunked loss and the attention for short sequences: values and gradients of the plain ones.

Shape suffixes: B sequences, L positions, N = B·L, D hidden size, V vocabulary.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from boltlm.errors import UserError
from boltlm.sequences.packing import IGNORE_INDEX
from boltlm.training import attention
from boltlm.training.loss import CausalLMLoss, ChunkedCrossEntropy, check_output_head
from tests import tiny

VOCAB_SIZE = 40


def small_config(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": None,
        **changes,
    }


MODELS = {
    "llama": lambda: tiny.llama(1, vocab_size=VOCAB_SIZE, hidden_size=16),
    "tied_llama": lambda: tiny.llama(1, vocab_size=VOCAB_SIZE, hidden_size=16, tied=True),
    "grouped_query": lambda: Qwen2ForCausalLM(
        Qwen2Config(**small_config(num_attention_heads=4, num_key_value_heads=2))
    ),
    "tied_qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**small_config(tie_word_embeddings=True))),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**small_config())),
}


@given(
    positions=st.integers(1, 9),
    vocab_size=st.integers(2, 7),
    max_logits=st.integers(1, 70),
    bias=st.booleans(),
    weighted=st.booleans(),
    data=st.data(),
)
def test_the_chunked_loss_is_cross_entropy(
    positions: int,
    vocab_size: int,
    max_logits: int,
    bias: bool,
    weighted: bool,
    data: st.DataObject,
) -> None:
    """In float64, for any chunk size; targets of IGNORE_INDEX contribute neither loss nor
    gradient, and the others as much as their weight says."""
    ids = st.sampled_from([IGNORE_INDEX, *range(vocab_size)])
    targets_N = torch.tensor(data.draw(st.lists(ids, min_size=positions, max_size=positions)))
    torch.manual_seed(1)
    shapes = ((positions, 3), (vocab_size, 3), (vocab_size,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    hidden_ND, weight_VD, bias_V = inputs[0], inputs[1], inputs[2] if bias else None
    loss_weights_N = torch.rand(positions) if weighted else None
    losses_N = cross_entropy(linear(hidden_ND, weight_VD, bias_V), targets_N, reduction="none")
    expected = (losses_N if loss_weights_N is None else losses_N * loss_weights_N).sum()
    (3.0 * expected).backward()
    expected_grads = [tensor.grad for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    loss: Any = ChunkedCrossEntropy.apply(
        hidden_ND, weight_VD, bias_V, targets_N, loss_weights_N, torch.float64, max_logits
    )
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
    (3.0 * loss).backward()
    for tensor, expected_grad in zip(inputs, expected_grads, strict=True):
        if expected_grad is not None:
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, expected_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_logits", [50, 1 << 20])
def test_the_loss_of_every_architecture(name: str, max_logits: int) -> None:
    """Llama, Qwen and GPT-NeoX, tied or not: the loss and the gradient of every parameter equal
    those computed from the model's logits."""
    torch.manual_seed(2)
    model: PreTrainedModel = MODELS[name]()
    check_output_head(model)
    inputs_BL = torch.randint(0, VOCAB_SIZE, (3, 10))
    labels_BL = torch.randint(0, VOCAB_SIZE, (3, 10))
    labels_BL[2, 6:] = IGNORE_INDEX
    logits_NV = model(input_ids=inputs_BL, use_cache=False).logits.flatten(0, 1)
    expected = cross_entropy(logits_NV, labels_BL.flatten(), reduction="sum")
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = CausalLMLoss(model, max_logits)(inputs_BL, labels_BL)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    assert grads.keys() == {name for name, _ in model.named_parameters()}
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grads[parameter_name], rtol=1e-4, atol=1e-4)


def test_the_loss_under_autocast_is_as_exact_as_the_plain_one() -> None:
    """bfloat16 products, float32 sums: its error is at most about that of the plain loss."""
    model = tiny.llama(3, vocab_size=VOCAB_SIZE, hidden_size=16)
    inputs_BL = torch.randint(0, VOCAB_SIZE, (4, 16))
    labels_BL = torch.randint(0, VOCAB_SIZE, (4, 16))
    exact = CausalLMLoss(model)(inputs_BL, labels_BL).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = CausalLMLoss(model)(inputs_BL, labels_BL)
        logits_BLV = model(input_ids=inputs_BL).logits
        plain = cross_entropy(logits_BLV.flatten(0, 1).float(), labels_BL.flatten())
    assert loss.dtype == torch.float32
    plain_error = abs(plain.item() * labels_BL.numel() - exact)
    assert abs(loss.item() - exact) <= 2 * plain_error + 1e-2
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_short_attention_equals_the_models_own(name: str) -> None:
    """In float32 the same loss and gradients as with the fused kernel, with grouped-query attention
    too. It is not used where it would compute something else, and only within its context."""
    torch.manual_seed(2)
    model: PreTrainedModel = MODELS[name]()
    inputs_BL, labels_BL = torch.randint(0, VOCAB_SIZE, (2, 3, 12))
    results: list[list[torch.Tensor]] = []
    for implementation in (None, attention.SHORT_ATTENTION):
        model.zero_grad()
        with attention.use_attention(model, implementation):
            assert attention.uses_short_attention(model) == (implementation is not None)
            loss = CausalLMLoss(model)(inputs_BL, labels_BL)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([loss.detach(), *grads])
    for tensor, expected in zip(*results, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)
    assert not attention.uses_short_attention(model)
    supports, too_long = attention.supports_short_attention, attention.MAX_SHORT_LENGTH + 1
    assert supports(model, 12, torch.bfloat16)
    assert not supports(model, too_long, torch.bfloat16)
    assert not supports(model, 12, torch.float32)
    model.config.sliding_window = 8
    assert not supports(model, 12, torch.bfloat16)


def test_plain_attention_is_as_exact_as_the_fused_kernel() -> None:
    """Compared with float64: with bfloat16 inputs, the errors of output and gradients are
    at most 1.5 times the kernel's. With scores rounded to bfloat16 they would be four times."""
    torch.manual_seed(4)
    inputs = [2 * torch.randn(2, 4, 96, 32).bfloat16() for _ in range(3)]
    grad = torch.randn(2, 4, 96, 32).bfloat16()
    errors: dict[str, list[float]] = {}
    exact: list[torch.Tensor] = []
    for name, dtype in (("exact", torch.float64), ("kernel", grad.dtype), ("plain", grad.dtype)):
        q, k, v = (tensor.clone().to(dtype).requires_grad_() for tensor in inputs)
        if name == "plain":
            output, _ = attention.causal_attention(torch.nn.Identity(), q, k, v, None)
            output = output.transpose(1, 2)
        else:
            output = scaled_dot_product_attention(q, k, v, is_causal=True)
        (output * grad.to(dtype)).sum().backward()
        tensors = [x.detach().double() for x in (output, q.grad, k.grad, v.grad) if x is not None]
        exact = exact or tensors
        errors[name] = [float((a - b).abs().mean()) for a, b in zip(tensors, exact, strict=True)]
    for plain, kernel in zip(errors["plain"], errors["kernel"], strict=True):
        assert 0 < plain < 1.5 * kernel


def test_scaled_logits_are_an_error() -> None:
    """Cohere scales its logits: the loss computed here would not be the model's."""
    model = CohereForCausalLM(CohereConfig(**small_config(logit_scale=0.25)))
    with pytest.raises(UserError, match="CohereForCausalLM: its logits"):
        check_output_head(model)
