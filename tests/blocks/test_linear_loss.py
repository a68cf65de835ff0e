"""The fused loss against the plain one: values and gradients, any chunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.blocks.linear_loss import IGNORED, linear_cross_entropy

OPTIONS = [(1.0, None), (0.5, None), (1.0, 3.0), (2.0, 5.0)]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((13, 6), (17, 6), (17,)))
    targets = torch.randint(0, 17, (13,))
    targets[[2, 7]] = IGNORED
    return x, weight, bias, targets


def plain(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    logits = F.linear(x, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk_len", [1, 4, 13, 100])
@pytest.mark.parametrize(("scale", "softcap"), OPTIONS)
def test_equals_the_plain_loss(scale: float, softcap: float | None, chunk_len: int, with_bias: bool) -> None:
    x, weight, bias, targets = inputs()
    given = bias if with_bias else None
    wanted = [x, weight, bias] if with_bias else [x, weight]
    found = linear_cross_entropy(x, weight, targets, given, scale, softcap, chunk_numbers=17 * chunk_len)
    expected = plain(x, weight, targets, given, scale, softcap)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(3 * found, wanted), torch.autograd.grad(3 * expected, wanted), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_frozen_parts_get_no_gradient_and_none_is_made_without_need() -> None:
    x, weight, bias, targets = inputs()
    found = linear_cross_entropy(x.detach(), weight, targets, bias.detach())
    found.backward()
    assert x.grad is None
    assert bias.grad is None
    torch.testing.assert_close(weight.grad, torch.autograd.grad(plain(x, weight, targets, bias, 1.0, None), weight)[0])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert not linear_cross_entropy(x, weight, targets).requires_grad
    assert counter.get_total_flops() == 2 * 13 * 17 * 6


def test_half_precision_sums_in_fp32_and_autocast_is_followed() -> None:
    x, weight, _, targets = inputs(torch.float32)
    expected = plain(x, weight, targets, None, 1.0, None)
    half = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.02, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(cast, half)
    cast.backward()
    assert weight.grad.dtype == torch.float32


def test_no_target_counts() -> None:
    x, weight, _, targets = inputs()
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORED))
    loss.backward()
    assert loss == 0
    assert not x.grad.any()
