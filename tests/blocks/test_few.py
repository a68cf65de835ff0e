"""Experts of a few tokens against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zoo.blocks.experts import Experts, loop_experts
from zoo.blocks.few import few_experts, is_few
from zoo.native.library import library

UNGATED = {"gated": False, "activation": "relu2", "bias": True}


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if library() is None:
        pytest.skip("no C++ compiler here")


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 8])
@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("options", [{}, UNGATED, {"bias": True}], ids=str)
def test_few_tokens_as_the_reference(options: dict[str, Any], weighed: bool, num_tokens: int) -> None:
    torch.manual_seed(0)
    experts = Experts(24, 6, 20, **options)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, scale = torch.randn(num_tokens, 24), torch.rand(num_tokens, 3) if weighed else None
    indices = torch.rand(num_tokens, 6).argsort(-1)[:, :3]
    with torch.no_grad():
        assert is_few(x, experts.stacked)
        found = few_experts(x, scale, indices, experts.stacked, experts.spec)
        torch.testing.assert_close(found, loop_experts(x, scale, indices, experts.stacked, experts.spec))


def test_bf16_is_rounded_once() -> None:
    torch.manual_seed(0)
    experts = Experts(32, 4, 16).to(torch.bfloat16)
    x, scale, indices = torch.randn(3, 32).to(torch.bfloat16), torch.rand(3, 2), torch.tensor([[0, 1], [3, 1], [2, 0]])
    wide = Experts(32, 4, 16)
    wide.load_state_dict({name: value.to(torch.float32) for name, value in experts.state_dict().items()})
    with torch.no_grad():
        found = few_experts(x, scale, indices, experts.stacked, experts.spec)
        exact = loop_experts(x.to(torch.float32), scale, indices, wide.stacked, wide.spec)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.to(torch.bfloat16), rtol=2**-7, atol=1e-6)


def test_who_wants_gradients_or_has_many_tokens_goes_elsewhere() -> None:
    experts = Experts(32, 4, 16)
    assert not is_few(torch.randn(1, 32), experts.stacked)
    with torch.no_grad():
        assert is_few(torch.randn(8, 32), experts.stacked)
        assert not is_few(torch.randn(9, 32), experts.stacked)
        assert not is_few(torch.randn(1, 32, dtype=torch.float64), experts.stacked)


def test_experts_take_this_way_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, taken = Experts(32, 4, 16), []
    monkeypatch.setattr("zoo.blocks.experts.few_experts", lambda *given: taken.append(1) or few_experts(*given))
    x, scale, indices = torch.randn(3, 32), torch.rand(3, 2), torch.tensor([[0, 1], [3, 1], [2, 0]])
    with torch.no_grad():
        found = experts(x, scale, indices)
        experts.backend = "loop"
        torch.testing.assert_close(found, experts(x, scale, indices))
    assert taken == [1]
