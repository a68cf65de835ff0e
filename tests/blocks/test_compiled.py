"""The compiled experts against the plain loop: outputs, gradients, and when they are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.blocks import compiled
from zoo.blocks.experts import Experts
from zoo.native.library import library
from zoo.spec.base import ConfigError

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler here")
D, E, F, C = 48, 5, 32, 2


def experts(num_experts: int = E, d_in: int = D, d_expert: int = F, **options: Any) -> Experts:
    """With weights large enough that the activations bend."""
    made = Experts(d_in, num_experts, d_expert, **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def results(module: Experts, backend: str, x: Tensor, w: Tensor | None, indices: Tensor) -> list[Tensor]:
    """Output, then the gradients of x, of the weights if there are any, and of every parameter."""
    module.backend = backend
    x, w = x.clone().requires_grad_(), None if w is None else w.clone().requires_grad_()
    output = module(x, w, indices)
    probe = torch.linspace(-1, 1, output.numel()).view_as(output)
    wanted = [part for part in (x, w, *module.parameters()) if part is not None]
    return [output.detach(), *torch.autograd.grad((output * probe).sum(), wanted)]


def assert_agree(module: Experts, x: Tensor, w: Tensor | None, indices: Tensor, bound: float = 3e-6) -> None:
    for found, expected in zip(
        results(module, "compiled", x, w, indices), results(module, "loop", x, w, indices), strict=True
    ):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        if found.numel():
            assert float((found - expected).abs().max()) <= bound * float(expected.abs().max())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 40, 700])
def test_agrees_with_the_loop(num_tokens: int, recompute: bool) -> None:
    """Few rows, which are not packed, and many, which are."""
    indices = torch.rand(num_tokens, E).topk(C).indices
    assert_agree(experts(recompute=recompute), torch.randn(num_tokens, D), torch.rand(num_tokens, C), indices)


@pytest.mark.parametrize(
    ("d_in", "d_expert", "rows"), [(1040, 16, 70), (16, 1040, 70), (304, 288, 9), (544, 640, 1100)]
)
def test_widths_and_blocks(d_in: int, d_expert: int, rows: int) -> None:
    """Panels that end in the middle, sums over several depths, more rows than a block has."""
    module = Experts(d_in, 2, d_expert)
    indices = torch.randint(2, (rows, 1))
    assert_agree(module, torch.randn(rows, d_in), torch.rand(rows, 1), indices, 1e-5)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_load(data: st.DataObject) -> None:
    num_experts, num_tokens = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 90))
    top_k = data.draw(st.integers(1, num_experts))
    favour = torch.tensor(data.draw(st.lists(st.floats(0, 5), min_size=num_experts, max_size=num_experts)))
    noise = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    indices = (favour + noise).topk(top_k).indices
    weights = torch.rand(indices.shape) if data.draw(st.booleans()) else None
    assert_agree(experts(num_experts, 16, 16), torch.randn(num_tokens, 16), weights, indices, 1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads: int) -> None:
    """More threads than choices take another way to sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_agree(experts(), torch.randn(60, D), torch.rand(60, C), torch.rand(60, E).topk(C).indices)
    finally:
        torch.set_num_threads(before)


def test_sorts_stably() -> None:
    indices = torch.rand(50, 7).topk(3).indices
    found = compiled.Sorted.of(indices, 7)
    expected = indices.flatten().sort(stable=True)
    assert torch.equal(found.order, expected.indices)
    counts = torch.bincount(indices.flatten(), minlength=7)
    assert found.bounds.diff().tolist() == counts.tolist()
    assert found.longest == counts.max()
    with pytest.raises(IndexError, match="none of the 3 experts"):
        compiled.Sorted.of(indices, 3)


def test_equal_inputs_give_equal_bits() -> None:
    module, x, w, indices = experts(), torch.randn(90, D), torch.rand(90, C), torch.rand(90, E).topk(C).indices
    first, second = (results(module, "compiled", x, w, indices) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_large_and_broken_numbers() -> None:
    """Activations whose exponential overflows saturate; what is no number stays none."""
    module, indices = experts(), torch.zeros(4, 1, dtype=torch.int64)
    assert_agree(module, torch.randn(4, D) * 1e3, None, indices)
    x = torch.randn(4, D)
    x[1, 0] = torch.nan
    module.backend = "compiled"
    assert module(x, None, indices).isfinite().all(1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("frozen", [["gate_up"], ["down"], ["gate_up", "down"]])
def test_frozen_parameters(frozen: list[str]) -> None:
    module, x, indices = experts(backend="compiled"), torch.randn(40, D, requires_grad=True), torch.rand(40, E).topk(C)
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    module(x, None, indices.indices).square().sum().backward()
    assert x.grad is not None
    assert {name for name, parameter in module.named_parameters() if parameter.grad is None} == set(frozen)


def test_the_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = experts(), torch.randn(40, D)
    assert module.backend_for(x, 80) == "compiled"
    with FlopCounterMode(display=False):
        assert module.backend_for(x, 80) != "compiled"
    assert experts(gated=False, activation="relu2").backend_for(x, 80) != "compiled"
    assert experts(d_expert=30).backend_for(x, 80) != "compiled"
    assert module.double().backend_for(x.double(), 80) == "grouped"
    monkeypatch.setattr(compiled, "is_loaded", lambda: False)
    assert experts().backend_for(x, 80) != "compiled"


def test_one_thread_is_not_left_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    even, collapsed = torch.rand(40, E).topk(C).indices, torch.zeros(40, 1, dtype=torch.int64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert compiled.Sorted.of(even, E).is_even()
    assert not compiled.Sorted.of(collapsed, E).is_even()


@pytest.mark.parametrize("options", [{"bias": True}, {"gated": False}, {"activation": "gelu"}, {"d_expert": 30}])
def test_what_the_kernel_does_not_compute(options: dict[str, Any]) -> None:
    module = experts(backend="compiled", **options)
    with pytest.raises(ConfigError, match="experts: compiled needs gated silu experts without biases, fp32"):
        module(torch.randn(3, D), None, torch.zeros(3, 1, dtype=torch.int64))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "library", lambda: None)
    with pytest.raises(ConfigError, match="compiled needs a C\\+\\+ compiler"):
        experts(backend="compiled")(torch.randn(3, D), None, torch.zeros(3, 1, dtype=torch.int64))
