"""The gated short convolution against its formula and against transformers; cached, padded and packed passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.blocks import mixer_checks
from zoo.blocks.base import initialize
from zoo.blocks.short_conv import ShortConv
from zoo.spec.short_conv import ShortConvSpec

D = 24
OPTIONS: dict[str, dict[str, Any]] = {"three": {}, "wide": {"width": 7}, "one": {"width": 1}, "bias": {"bias": True}}


def make(name: str) -> ShortConv:
    block = ShortConv(D, **OPTIONS[name]).double()
    initialize(block, 0.5, 0.5)
    for parameter in block.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return block


def plain(block: ShortConv, x: Tensor) -> Tensor:
    """One row [s, d], token by token."""
    u, rows = block.b(x) * block.v(x), []
    for t in range(len(x)):
        y = sum(block.conv.weight[:, 0, -1 - back] * u[t - back] for back in range(min(block.spec.width, t + 1)))
        y = y if block.conv.bias is None else y + block.conv.bias
        rows.append(block.out(block.c(x[t]) * y))
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, 2, 11])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_formula_with_all_gradients(name: str, length: int) -> None:
    block, x = make(name), torch.randn(2, length, D, dtype=torch.float64, requires_grad=True)
    expected, found = torch.stack([plain(block, row) for row in x]), block(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    leaves, weights = [x, *block.parameters()], torch.randn_like(expected)
    gradients = [torch.autograd.grad(outputs, leaves, weights) for outputs in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pieces", mixer_checks.PIECES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_cached_equals_whole(name: str, pieces: list[int]) -> None:
    mixer_checks.check_cached(make(name), pieces)


@pytest.mark.parametrize("pieces", mixer_checks.PIECES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_left_padding_changes_nothing(name: str, pieces: list[int]) -> None:
    mixer_checks.check_left_padding(make(name), pieces)


@pytest.mark.parametrize("name", OPTIONS)
def test_documents_of_a_row_do_not_meet(name: str) -> None:
    mixer_checks.check_documents(make(name))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", ["lfm2", "lfm2_moe", "lfm3"])
def test_equals_transformers(family: str, bias: bool) -> None:
    import transformers

    prefix = {"lfm2": "Lfm2", "lfm2_moe": "Lfm2Moe", "lfm3": "Lfm3"}[family]
    layers = {"num_hidden_layers": 1, "layer_types": ["conv"]}
    config = getattr(transformers, f"{prefix}Config")(hidden_size=D, conv_L_cache=5, conv_bias=bias, **layers)
    module = getattr(transformers.models, family)
    theirs = getattr(getattr(module, f"modeling_{family}"), f"{prefix}ShortConv")(config, 0)
    ours = ShortConv(D, width=5, bias=bias)
    held = dict(theirs.named_parameters())
    names = {"out": "out_proj", "conv": "conv"}
    weights = {f"{name}.{key}": held[f"{their}.{key}"] for name, their in names.items() for key in held_keys(bias)}
    for key in held_keys(bias):  # theirs is one matrix, for b, c and v in this order
        weights |= zip((f"b.{key}", f"c.{key}", f"v.{key}"), held[f"in_proj.{key}"].chunk(3), strict=True)
    ours.load_state_dict(weights)
    for dtype, largest in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        x = torch.randn(2, 13, D, dtype=dtype)
        expected = theirs.to(dtype)(x)
        assert (ours.to(dtype)(x) - expected).abs().max() < largest * expected.std()


def held_keys(bias: bool) -> list[str]:
    """What each of their modules holds."""
    return ["weight", "bias"] if bias else ["weight"]


def test_a_tiny_twin_is_the_same_block() -> None:
    assert ShortConvSpec(width=7).shrunk(2048) == ShortConvSpec(width=7)
