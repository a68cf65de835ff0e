"""What a cost says against what the built module holds and what torch counts while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.blocks.base import build_block, initialize
from zoo.plan.base import Weight, cost_of
from zoo.spec import BlockSpec, MixerSpec, ModelSpec, NormSpec

NORMS = (NormSpec(), NormSpec(type="layer", bias=True), NormSpec(weight="none"))
D_MODEL = 24


def counted_flops(call: Callable[..., Any], *inputs: Any) -> dict[str, int]:
    """FLOPs of a call of a module by the name of the submodule, as torch counts them; the whole is under `Global`.

    The fused attention of a CPU has no formula there, so attention runs as plain products.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(*inputs)
    return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}


def shapes(weights: Iterable[Weight]) -> dict[str, tuple[int, ...]]:
    """Name to shape; names must not repeat."""
    weights = list(weights)
    named = {weight.name: weight.shape for weight in weights}
    assert len(named) == len(weights)
    return named


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name to shape of what is trained."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _check_block(spec: BlockSpec) -> None:
    for norm in NORMS:
        with torch.device("meta"):
            module = build_block(spec, D_MODEL, norm)
        cost = cost_of(spec, D_MODEL, norm)
        assert shapes(cost.weights()) == parameter_shapes(module)
    module.to_empty(device="cpu")
    with torch.no_grad():
        initialize(module, 0.02, 0.02)
    batch_size, seq_len = 2, 11
    inputs = [torch.randn(batch_size, seq_len, D_MODEL), None]
    counted = counted_flops(module, *inputs, *([None] if isinstance(spec, MixerSpec) else []))["Global"]
    assert sum(cost.flops(seq_len, skip_masked=False).values()) * batch_size * seq_len == pytest.approx(
        counted, rel=1e-9
    )


@pytest.fixture
def check_block() -> Callable[[BlockSpec], None]:
    """Asserts that the cost of a block equals its module: names and shapes under several norms, and FLOPs."""
    return _check_block


@pytest.fixture
def check_names() -> Callable[[Iterable[Weight], nn.Module], None]:
    """Asserts that weights are the parameters of a module, name by name and shape by shape."""

    def check(weights: Iterable[Weight], module: nn.Module) -> None:
        assert shapes(weights) == parameter_shapes(module)

    return check


@pytest.fixture
def count_with_torch() -> Callable[..., dict[str, int]]:
    """`counted_flops`."""
    return counted_flops


@pytest.fixture(scope="session")
def load_model() -> Callable[[str], ModelSpec]:
    """`zoo.load`, which composes a model once for all tests."""
    return cache(zoo.load)
