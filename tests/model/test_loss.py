"""The piecewise loss: value and gradients of the plain cross-entropy, in every family."""

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
from boltlm.model import attention
from boltlm.model.loss import CausalLoss, PiecewiseLoss, check_head
from boltlm.sequences.packing import IGNORED
from tests import tiny

VOCABULARY = 40


def small(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": None,
        **changes,
    }


FAMILIES = {
    "llama": lambda: tiny.llama(1, vocabulary=VOCABULARY, width=16),
    "tied": lambda: tiny.llama(1, vocabulary=VOCABULARY, width=16, tied=True),
    "shared": lambda: Qwen2ForCausalLM(
        Qwen2Config(**small(num_attention_heads=4, num_key_value_heads=2))
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**small(tie_word_embeddings=True))),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**small())),
}


@given(
    positions=st.integers(1, 9),
    vocabulary=st.integers(2, 7),
    logits=st.integers(1, 70),
    bias=st.booleans(),
    data=st.data(),
)
def test_it_is_cross_entropy(
    positions: int, vocabulary: int, logits: int, bias: bool, data: st.DataObject
) -> None:
    """In float64, whatever the pieces; targets that are IGNORED give nothing to either."""
    targets = data.draw(
        st.lists(
            st.sampled_from([IGNORED, *range(vocabulary)]),
            min_size=positions,
            max_size=positions,
        )
    )
    torch.manual_seed(1)
    targets_N = torch.tensor(targets)
    shapes = ((positions, 3), (vocabulary, 3), (vocabulary,))
    given_ = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    hidden, weight, bias_V = given_[0], given_[1], given_[2] if bias else None
    wanted = cross_entropy(linear(hidden, weight, bias_V), targets_N, reduction="sum")
    (3.0 * wanted).backward()
    gradients = [tensor.grad for tensor in given_]
    for tensor in given_:
        tensor.grad = None
    found: Any = PiecewiseLoss.apply(hidden, weight, bias_V, targets_N, torch.float64, logits)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    (3.0 * found).backward()
    for tensor, gradient in zip(given_, gradients, strict=True):
        if gradient is not None:
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("logits", [50, 1 << 20])
def test_every_family_has_its_own_models_loss(family: str, logits: int) -> None:
    """Llama, Qwen, GPT-NeoX, tied or not: value and every parameter's gradient."""
    torch.manual_seed(2)
    model: PreTrainedModel = FAMILIES[family]()
    check_head(model)
    inputs_BL = torch.randint(0, VOCABULARY, (3, 10))
    labels_BL = torch.randint(0, VOCABULARY, (3, 10))
    labels_BL[2, 6:] = IGNORED
    logits_NV = model(input_ids=inputs_BL, use_cache=False).logits.flatten(0, 1)
    wanted = cross_entropy(logits_NV, labels_BL.flatten(), reduction="sum")
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = CausalLoss(model, logits)(inputs_BL, labels_BL)
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-4)


def test_under_autocast_it_is_as_near_as_the_plain_one() -> None:
    """bfloat16 products, float32 sums: no further from float32 than the plain loss is."""
    model = tiny.llama(3, vocabulary=VOCABULARY, width=16)
    inputs_BL = torch.randint(0, VOCABULARY, (4, 16))
    labels_BL = torch.randint(0, VOCABULARY, (4, 16))
    exact = CausalLoss(model)(inputs_BL, labels_BL).item()
    with torch.autocast("cpu", torch.bfloat16):
        found = CausalLoss(model)(inputs_BL, labels_BL)
        logits_BLV = model(input_ids=inputs_BL).logits
        plain = cross_entropy(logits_BLV.flatten(0, 1).float(), labels_BL.flatten())
    assert found.dtype == torch.float32
    assert abs(found.item() - exact) <= 2 * abs(plain.item() * labels_BL.numel() - exact) + 1e-2
    found.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_over_short_rows_is_sdpas(family: str) -> None:
    """In float32 the same loss and gradients as the fused kernel's, where heads of keys and values
    are shared too; it suits only what it computes rightly, and is put back."""
    torch.manual_seed(2)
    model: PreTrainedModel = FAMILIES[family]()
    inputs_BL, labels_BL = torch.randint(0, VOCABULARY, (2, 3, 12))
    found: list[list[torch.Tensor]] = []
    for name in (None, attention.NAME):
        model.zero_grad()
        with attention.attention(model, name):
            assert attention.active(model) == (name is not None)
            loss = CausalLoss(model)(inputs_BL, labels_BL)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([loss.detach(), *grads])
    assert not attention.active(model)
    assert attention.suits(model, 12, torch.bfloat16)
    assert not attention.suits(model, attention.SHORT + 1, torch.bfloat16)
    assert not attention.suits(model, 12, torch.float32)
    model.config.sliding_window = 8
    assert not attention.suits(model, 12, torch.bfloat16)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_plain_attention_is_as_exact_as_the_fused_kernel() -> None:
    """bfloat16 inputs, float64 by the definition: value and gradients stray no further than half
    as far again as the kernel's. Scores that are rounded to bfloat16 stray four times as far."""
    torch.manual_seed(4)
    inputs = [2 * torch.randn(2, 4, 96, 32).bfloat16() for _ in range(3)]
    pull = torch.randn(2, 4, 96, 32).bfloat16()
    errors: dict[str, list[float]] = {}
    exact: list[torch.Tensor] = []
    for name, dtype in (("exact", torch.float64), ("kernel", pull.dtype), ("plain", pull.dtype)):
        q, k, v = (tensor.clone().to(dtype).requires_grad_() for tensor in inputs)
        if name == "plain":
            found = attention.causal(torch.nn.Identity(), q, k, v, None)[0].transpose(1, 2)
        else:
            found = scaled_dot_product_attention(q, k, v, is_causal=True)
        (found * pull.to(dtype)).sum().backward()
        made = [x.detach().double() for x in (found, q.grad, k.grad, v.grad) if x is not None]
        exact = exact or made
        errors[name] = [float((a - b).abs().mean()) for a, b in zip(made, exact, strict=True)]
    for plain, kernel in zip(errors["plain"], errors["kernel"], strict=True):
        assert 0 < plain < 1.5 * kernel


def test_scaled_logits_are_an_error() -> None:
    """Cohere scales its logits: the loss here would be another than the model's."""
    model = CohereForCausalLM(CohereConfig(**small(logit_scale=0.25)))
    with pytest.raises(UserError, match="CohereForCausalLM: its logits"):
        check_head(model)
