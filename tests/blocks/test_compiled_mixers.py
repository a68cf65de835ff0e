"""The compiled kernels of mixers against the same in plain torch in fp64: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.blocks import compiled_mixers as compiled
from zoo.blocks.base import Mixer, initialize
from zoo.blocks.conv import _Convolution
from zoo.blocks.delta import GatedDelta
from zoo.blocks.delta_rule import delta_chunks
from zoo.blocks.mamba2 import Mamba2
from zoo.blocks.ssd import ssd
from zoo.native.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler here")
Compute = Callable[..., Any]
EXACT = 2e-6
"""Largest difference, as a share of the largest number."""


def results(compute: Compute, inputs: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then the gradients of all inputs, for the same random gradients of outputs."""
    leaves = [None if part is None else part.detach().to(dtype).requires_grad_() for part in inputs]
    found = compute(*leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    torch.manual_seed(1)
    weights = [torch.randn(part.shape, dtype=torch.float64).to(dtype) for part in outputs]
    grads = torch.autograd.grad(outputs, [part for part in leaves if part is not None], weights)
    return [*(part.detach() for part in outputs), *grads]


def assert_agree(found: Compute, expected: Compute, *inputs: Tensor | None) -> None:
    pairs = zip(results(found, inputs, torch.float32), results(expected, inputs, torch.float64), strict=True)
    for mine, wanted in pairs:
        assert mine.shape == wanted.shape
        assert float((mine.double() - wanted).abs().max()) <= EXACT * max(float(wanted.abs().max()), 0.1)


def documents_of(batch: int, length: int, packed: bool) -> Tensor | None:
    return (torch.rand(batch, length) < 0.1).cumsum(1) if packed else None


@pytest.mark.parametrize(("strength", "packed"), [(0.1, False), (5.0, True), (1000.0, False), (1000.0, True)])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "groups", "p", "n"),
    [(2, 150, 4, 2, 8, 6), (1, 64, 4, 1, 64, 128), (2, 37, 6, 3, 24, 16), (1, 1, 2, 1, 4, 4), (1, 130, 3, 3, 5, 33)],
)
def test_ssd(batch: int, length: int, heads: int, groups: int, p: int, n: int, strength: float, packed: bool) -> None:
    documents = documents_of(batch, length, packed)
    x, dt, a = torch.randn(batch, length, heads, p), torch.rand(batch, length, heads), -strength * torch.rand(heads)
    b, c = (torch.randn(batch, length, groups, n) for _ in range(2))
    assert_agree(
        lambda *given: compiled.CompiledSSD.apply(*given, documents),
        lambda x, dt, a, b, c, start: ssd(x, dt, a, b, c, 16, start, documents),
        *(x, dt, a, b, c, torch.randn(batch, heads, p, n)),
    )


@pytest.mark.parametrize(("strength", "packed"), [(0.1, False), (5.0, True), (1000.0, False), (1000.0, True)])
@pytest.mark.parametrize(
    ("batch", "length", "qk_heads", "shared_by", "k", "v"),
    [(2, 150, 2, 2, 6, 5), (1, 64, 4, 1, 128, 64), (2, 37, 1, 3, 24, 16), (1, 1, 2, 1, 4, 4), (1, 130, 3, 1, 16, 33)],
)
def test_delta_rule(
    batch: int, length: int, qk_heads: int, shared_by: int, k: int, v: int, strength: float, packed: bool
) -> None:
    heads, documents = qk_heads * shared_by, documents_of(batch, length, packed)
    q, key = (F.normalize(torch.randn(batch, length, qk_heads, k), dim=-1) for _ in range(2))
    log_decay, beta = -strength * torch.rand(batch, length, heads), 1.9 * torch.rand(batch, length, heads)
    assert_agree(
        lambda *given: compiled.CompiledDelta.apply(*given, documents),
        lambda q, key, v, g, beta, start: delta_chunks(q, key, v, g[..., None], beta, start, documents, 16),
        *(q, key, torch.randn(batch, length, heads, v), log_decay, beta, torch.randn(batch, heads, k, v)),
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "width", "bias"),
    [(2, 50, 300, 4, True), (1, 300, 128, 3, False), (2, 20, 5, 6, True), (1, 5, 130, 1, True), (2, 3, 40, 5, False)],
)
def test_convolution(
    batch: int, length: int, channels: int, width: int, bias: bool, activated: bool, packed: bool
) -> None:
    documents = documents_of(batch, length, packed)
    inputs = (torch.randn(batch, length, channels), torch.randn(channels, 1, width))
    assert_agree(
        lambda *given: compiled.CompiledConv.apply(*given, documents, activated),
        lambda *given: _Convolution.apply(*given, documents, activated),
        *(*inputs, torch.randn(channels) if bias else None),
    )


@pytest.mark.parametrize("gate_last", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gated_norm(shared: bool, sigmoid: bool, gate_last: bool) -> None:
    def plain(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        opening = torch.sigmoid(gate) if sigmoid else F.silu(gate)
        normed = F.rms_norm(x if gate_last else x * opening, x.shape[-1:], None, 1e-5)
        y = normed * (weight if shared else weight.view(3, 20))
        return y * opening if gate_last else y

    x, gate = torch.randn(2, 7, 3, 20), torch.randn(2, 7, 3, 20)
    assert_agree(
        lambda *given: compiled.CompiledGatedNorm.apply(*given, 1e-5, sigmoid, gate_last),
        plain,
        *(x, gate, torch.randn(20 if shared else 60)),
    )


def test_unit_length() -> None:
    def plain(x: Tensor) -> Tensor:
        unit = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        return torch.cat((unit[..., :2, :] * 0.3, unit[..., 2:, :]), -2)

    assert_agree(lambda x: compiled.CompiledUnit.apply(x, 1e-6, 2, 0.3), plain, torch.randn(2, 9, 4, 7))


LAYERS: dict[str, Callable[[], Mixer]] = {
    "mamba2": lambda: Mamba2(48, num_heads=6, head_dim=16, num_groups=2, d_state=24),
    "mamba2_normed_first": lambda: Mamba2(48, num_heads=6, head_dim=16, norm_before_gate=True, norm_span="full"),
    "delta": lambda: GatedDelta(48, num_heads=4, num_qk_heads=2, head_dim=16, v_head_dim=24),
    "channels": lambda: GatedDelta(48, num_heads=4, head_dim=16, decay={"per": "channel"}, gate_activation="sigmoid"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_whole_layers_take_the_kernels_and_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By views of what their projections and convolutions give; every weight's gradient."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    initialize(layer, 0.3, 0.3)
    called: list[str] = []
    call = compiled._call
    monkeypatch.setattr(compiled, "_call", lambda kernel, *given: called.append(kernel) or call(kernel, *given))
    found = results(layer, [torch.randn(2, 150, 48)], torch.float32), [*(w.grad for w in layer.parameters())]
    wanted = {"mamba2": {"ssd", "conv", "gated_norm"}, "delta": {"delta", "conv", "gated_norm", "unit"}}
    kernels = wanted.get(name.partition("_")[0], {"conv", "gated_norm", "unit"})
    assert {kernel.rpartition("_")[0] for kernel in called} == kernels
    del found
    x = torch.randn(2, 150, 48)
    layer(x).square().sum().backward()
    mine = [weight.grad.double() for weight in layer.parameters()]
    layer.zero_grad()
    exact = layer.double()
    exact(x.double()).square().sum().backward()
    for grad, weight in zip(mine, exact.parameters(), strict=True):
        assert float((grad - weight.grad).abs().max()) <= 2e-4 * float(weight.grad.abs().max())


def test_what_does_not_fit_is_left_to_torch() -> None:
    x = torch.randn(1, 2000, 4)
    assert compiled.fits(x)
    assert not any(compiled.fits(other) for other in (x.double(), x.bfloat16(), x[:, :100], x.to("meta")))
    assert not compiled.fits(x, torch.nn.Buffer(torch.ones(2, dtype=torch.float64)))
