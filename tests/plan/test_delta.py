"""The cost of the gated delta rule and of the short convolution, option by option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from zoo.plan.base import cost_of
from zoo.spec import BlockSpec, DeltaSpec, NormSpec, ShortConvSpec
from zoo.spec.delta import DecaySpec

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_qk_heads": 2},
    {"v_head_dim": 10},
    {"conv_width": 3},
    {"chunk_size": 4},
    {"chunk_size": 1},
    {"decay": {"per": "channel"}},
    {"decay": {"per": "channel", "rank": 5, "lower_bound": -5.0}, "gate_rank": 3},
    {"decay": {"per": "channel"}, "num_qk_heads": 1, "chunk_size": 4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_delta_equals_the_module(options: dict[str, Any], check_block: Callable[[BlockSpec], None]) -> None:
    check_block(DeltaSpec.model_validate({"num_heads": 4, "head_dim": 6, **options}))


@pytest.mark.parametrize("bias", [False, True])
def test_short_conv_equals_the_module(bias: bool, check_block: Callable[[BlockSpec], None]) -> None:
    check_block(ShortConvSpec(bias=bias))


@pytest.mark.parametrize("per", ["head", "channel"])
def test_the_rule_costs_what_its_chunks_need(per: str) -> None:
    """11 tokens in chunks of 4, 4 and 3: each pair once, and each token meets the state three times."""
    spec = DeltaSpec(num_heads=2, head_dim=6, v_head_dim=8, chunk_size=4, decay=DecaySpec(per=per))
    pairs = 10 + 10 + 6
    among = 2 * 6 * (pairs if per == "head" else pairs - 11)  # the diagonal needs no product of matrices there
    inverse = 4 + 4 + 1  # triples i > j > k of a chunk
    multiply_adds = 2 * (among + pairs * (2 * 8 + 6) + inverse + 11 * 3 * 6 * 8)
    assert cost_of(spec, 24, NormSpec()).flops(seq_len=11)["rule"] == pytest.approx(2 * multiply_adds / 11)


def test_cost_grows_with_the_sequence_only_up_to_a_chunk() -> None:
    cost = cost_of(DeltaSpec(num_heads=2, head_dim=16), 24, NormSpec())
    assert cost.flops(64)["rule"] == cost.flops(6400)["rule"] > cost.flops(32)["rule"]
