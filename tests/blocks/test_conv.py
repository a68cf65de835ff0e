"""The causal convolution against torch's; cached, padded and packed passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.blocks.base import Context, initialize
from zoo.blocks.conv import CausalConv, zero_padding


def make(channels: int = 6, width: int = 4, bias: bool = True, activation: str = "silu") -> CausalConv:
    conv = CausalConv(channels, width, bias, activation).double()
    initialize(conv, 0.02, 0.02)
    return conv


def reference(conv: CausalConv, x: Tensor) -> Tensor:
    padded = F.pad(x.mT, (conv.width - 1, 0))
    y = F.conv1d(padded, conv.weight, conv.bias, groups=conv.channels).mT
    return F.silu(y) if conv.activation == "silu" else y


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(1, 5),
    length=st.integers(1, 9),
    bias=st.booleans(),
    activation=st.sampled_from(["silu", "none"]),
    seed=st.integers(0, 99),
)
def test_equals_torch_with_all_gradients(width: int, length: int, bias: bool, activation: str, seed: int) -> None:
    torch.manual_seed(seed)
    conv = make(6, width, bias, activation)
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    found, expected = conv(x), reference(conv, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights, leaves = torch.randn_like(x), [x, *conv.parameters()]
    gradients = [torch.autograd.grad(y, leaves, weights) for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


@settings(deadline=None, max_examples=30)
@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=5), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_cached_equals_whole(pieces: list[int], width: int, seed: int) -> None:
    torch.manual_seed(seed)
    conv, x = make(3, width), torch.randn(2, sum(pieces), 3, dtype=torch.float64)
    state = conv.new_state(2, x.device, x.dtype)
    y = torch.cat([conv(piece, None, state) for piece in x.split(pieces, 1)], 1)
    torch.testing.assert_close(y, conv(x), rtol=0, atol=1e-12)


def test_documents_and_padding_are_walls() -> None:
    conv, x = make(), torch.randn(1, 9, 6, dtype=torch.float64, requires_grad=True)
    documents = torch.tensor([[5] * 2 + [2] * 6 + [3]])
    y = conv(x, Context(torch.zeros(1, 9), documents=documents))
    expected = torch.cat([conv(part) for part in x.split([2, 6, 1], 1)], 1)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(y)
    leaves = [x, *conv.parameters()]
    torch.testing.assert_close(torch.autograd.grad(y, leaves, weights), torch.autograd.grad(expected, leaves, weights))
    padded = conv(x, Context(torch.zeros(1, 9), padding=torch.tensor([4])))
    torch.testing.assert_close(padded[:, 4:], conv(x[:, 4:]), rtol=0, atol=1e-12)


def test_zero_padding_counts_the_tokens_before_this_pass() -> None:
    x = torch.ones(2, 3, 2, 2)
    context = Context(torch.zeros(1, 3), past=2, padding=torch.tensor([1, 4]))
    assert zero_padding(x, context)[..., 0, 1].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_documents_and_a_state_are_refused_together() -> None:
    conv, x = make(), torch.randn(1, 4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="documents are for whole rows"):
        conv(x, Context(torch.zeros(1, 4), documents=torch.zeros(1, 4)), conv.new_state(1, x.device, x.dtype))


def test_sums_are_taken_in_fp32_for_bf16() -> None:
    conv = make(64, 4)
    x = torch.randn(2, 30, 64, dtype=torch.float64).bfloat16().requires_grad_()
    low = conv.bfloat16()
    y = low(x)
    conv64 = CausalConv(64, 4, True).double()
    conv64.load_state_dict(low.state_dict())
    expected = reference(conv64, x.double())
    torch.testing.assert_close(y, expected.bfloat16(), rtol=0.008, atol=1e-5)
    y.sum().backward()
    assert x.grad.dtype == low.weight.grad.dtype == torch.bfloat16


def test_starts_within_the_bound_of_its_width() -> None:
    conv = make(500, 4)
    assert 0.49 < conv.weight.abs().max() <= 0.5
    assert 0.45 < conv.bias.abs().max() <= 0.5
