"""The cost of attention, option by option, and the keys that a query sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.plan.attention import visible_pairs
from zoo.plan.base import cost_of
from zoo.spec import AttentionSpec, BlockSpec, NormSpec

OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 4},
    {"head_dim": 10},
    {"head_dim": 10, "v_head_dim": 4},
    {"qkv_bias": True},
    {"out_bias": True},
    {"qk_norm": "head"},
    {"qk_norm": "full", "head_dim": 4},
    {"qk_norm": "head", "qk_norm_weight": "none"},
    {"v_norm": True},
    {"sink": True},
    {"softcap": 5.0},
    {"gate": "head", "qkv_bias": True},
    {"gate": "element", "head_dim": 10, "v_head_dim": 4},
    {"shared_kv": True},
    {"mask": "sliding", "window": 3},
    {"mask": "chunked", "window": 4},
    {"rope": None, "mask": "sliding", "window": 30},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_module(options: dict[str, Any], check_block: Callable[[BlockSpec], None]) -> None:
    check_block(AttentionSpec.model_validate({"num_heads": 4, "num_kv_heads": 2, **options}))


LENGTH, WINDOW = st.integers(1, 60), st.integers(1, 70)


@given(LENGTH)
def test_causal_pairs(seq_len: int) -> None:
    assert visible_pairs(seq_len) == sum(key <= query for query in range(seq_len) for key in range(seq_len))
    assert visible_pairs(seq_len) / seq_len == (seq_len + 1) / 2


@given(LENGTH, WINDOW)
def test_pairs_in_a_sliding_window(seq_len: int, window: int) -> None:
    seen = sum(query - window < key <= query for query in range(seq_len) for key in range(seq_len))
    assert visible_pairs(seq_len, window) == seen


@given(LENGTH, WINDOW)
def test_pairs_in_chunks(seq_len: int, window: int) -> None:
    seen = sum(key <= query and key // window == query // window for query in range(seq_len) for key in range(seq_len))
    assert visible_pairs(seq_len, window, chunked=True) == seen


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, 6.0),
        ({"mask": "sliding", "window": 3}, (1 + 2 + 9 * 3) / 11),
        ({"mask": "chunked", "window": 4}, (10 + 10 + 6) / 11),
    ],
)
def test_scores_follow_the_visible_keys(options: dict[str, Any], keys: float) -> None:
    """Two products for each visible key: 4 heads of 6 channels with the key, of 8 with the value."""
    spec = AttentionSpec.model_validate({"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "v_head_dim": 8, **options})
    flops = cost_of(spec, 24, NormSpec()).flops(seq_len=11)
    assert flops["scores"] == pytest.approx(2 * 4 * (6 + 8) * keys)
    assert flops[""] == 2 * 24 * (4 * 6 + 2 * 6 + 2 * 8 + 4 * 8)
