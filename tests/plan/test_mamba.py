"""The cost of state-space mixers, option by option, and of the released sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from zoo.plan.base import cost_of
from zoo.spec import BlockSpec, Mamba1Spec, Mamba2Spec, NormSpec

MAMBA2: list[dict[str, Any]] = [
    {},
    {"num_groups": 2},
    {"num_groups": 4, "conv_width": 2, "conv_bias": False},
    {"bias": True, "norm_span": "full", "dt_min": 0.1},
    {"chunk_size": 4},
    {"chunk_size": 11},
]
MAMBA1: list[dict[str, Any]] = [
    {},
    {"inner_norms": True},
    {"d_inner": 10, "dt_rank": 3, "bias": True, "conv_bias": False},
]


@pytest.mark.parametrize("options", MAMBA2, ids=str)
def test_mamba2_equals_the_module(options: dict[str, Any], check_block: Callable[[BlockSpec], None]) -> None:
    check_block(Mamba2Spec.model_validate({"num_heads": 4, "head_dim": 6, "d_state": 5, **options}))


@pytest.mark.parametrize("options", MAMBA1, ids=str)
def test_mamba1_equals_the_module(options: dict[str, Any], check_block: Callable[[BlockSpec], None]) -> None:
    check_block(Mamba1Spec.model_validate({"d_state": 5, **options}))


def test_the_scan_costs_what_its_chunks_need() -> None:
    """11 tokens in chunks of 4, 4 and 3: each pair once, and each token writes to the state and reads from it."""
    spec = Mamba2Spec(num_heads=6, head_dim=8, num_groups=2, d_state=5, chunk_size=4)
    pairs = 10 + 10 + 6
    multiply_adds = pairs * (2 * 5 + 6 * 8) + 2 * 11 * 6 * 8 * 5
    assert cost_of(spec, 24, NormSpec()).flops(seq_len=11)["scan"] == pytest.approx(2 * multiply_adds / 11)


def test_cost_grows_with_the_sequence_only_up_to_a_chunk() -> None:
    cost = cost_of(Mamba2Spec(num_heads=4), 64, NormSpec())
    assert cost.flops(128)["scan"] == cost.flops(12800)["scan"] > cost.flops(64)["scan"]
    assert cost.flops(128)["scan"] < cost.flops(128, skip_masked=False)["scan"]


def test_a_layer_of_the_largest_release_has_the_known_size() -> None:
    """Nemotron 3 Ultra: d_model 8192, 256 heads of 64, 8 groups, a state of 128 (transformers' module on meta)."""
    spec = Mamba2Spec(num_heads=256, head_dim=64, num_groups=8, d_state=128)
    projections = 8192 * (2 * 16384 + 2 * 1024 + 256) + 16384 * 8192
    vectors = 18432 * 4 + 18432 + 3 * 256 + 16384
    assert sum(weight.size for weight in cost_of(spec, 8192, NormSpec()).weights()) == projections + vectors
