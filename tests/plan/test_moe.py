"""The cost of a mixture of experts, option by option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from zoo.plan.base import Weight, cost_of
from zoo.spec import BlockSpec, MoESpec, NormSpec
from zoo.spec.parallel import ParallelSpec

OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 6},
    {"gated": False, "activation": "relu2"},
    {"bias": True, "num_shared_experts": 1},
    {"bias": True, "gated": False, "activation": "gelu"},
    {"num_shared_experts": 2},
    {"num_shared_experts": 1, "d_shared_expert": 20, "shared_gate": True},
    {"d_latent": 8},
    {"d_latent": 8, "latent_norm": True, "num_shared_experts": 1},
    {"router": {"type": "top_k", "score": "sigmoid", "correction_bias": True}},
    {"router": {"type": "top_k", "logit_bias": True, "score_chosen": True}},
    {"router": {"type": "top_k", "expert_scale": True, "input_norm": True}},
    {"router": {"type": "top_k", "score": "sigmoid", "weigh": "input"}},
    {"router": {"type": "sparse_mixer"}},
]


def moe(**options: Any) -> MoESpec:
    return MoESpec.model_validate({"num_experts": 6, "top_k": 2, "d_expert": 10, **options})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_module(options: dict[str, Any], check_block: Callable[[BlockSpec], None]) -> None:
    check_block(moe(**options))


def test_a_token_pays_for_its_experts_alone() -> None:
    weights = cost_of(moe(bias=True), 24, NormSpec()).weights()
    active = {weight.name: (weight.size, weight.active, weight.flops) for weight in weights}
    assert active == {
        "router.weight": (6 * 24, 6 * 24, 2 * 6 * 24),
        "experts.gate_up": (6 * 20 * 24, 2 * 20 * 24, 4 * 20 * 24),
        "experts.gate_up_bias": (6 * 20, 2 * 20, 0),
        "experts.down": (6 * 24 * 10, 2 * 24 * 10, 4 * 24 * 10),
        "experts.down_bias": (6 * 24, 2 * 24, 0),
    }


def test_active_counts_are_exact_where_floats_are_not() -> None:
    """A share of 1/49 times a size beyond 2 ** 53 that 49 divides."""
    shares = cost_of(moe(num_experts=49, top_k=1), 24, NormSpec()).weights()[1].share
    weight = Weight("experts", (49, 2**60 + 1), share=shares)
    assert weight.active == 2**60 + 1


@pytest.mark.parametrize("gated", [True, False])
def test_beside_a_dense_mixer(gated: bool, check_block: Callable[[BlockSpec], None]) -> None:
    options = {} if gated else {"gated": False, "activation": "gelu"}
    spec = ParallelSpec.model_validate({"dense": {"d_ffn": 40, **options}, "moe": moe(num_shared_experts=1)})
    check_block(spec)
    assert set(cost_of(spec, 24, NormSpec()).flops(1)) == {"dense", "router", "experts", "shared"}
