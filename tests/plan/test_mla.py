"""The cost of latent attention, option by option, and of the released sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.plan.attention import chosen_pairs
from zoo.plan.base import cost_of
from zoo.spec import AttentionSpec, BlockSpec, NormSpec
from zoo.spec.mla import MLASpec

BASE: dict[str, Any] = {
    "num_heads": 3,
    "d_kv_latent": 10,
    "nope_head_dim": 6,
    "rope_head_dim": 4,
    "v_head_dim": 5,
}
INDEXER: dict[str, Any] = {"num_heads": 5, "head_dim": 8, "top_k": 4}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"d_q_latent": 7},
    {"d_q_latent": 7, "latent_bias": True},
    {"latent_bias": True, "out_bias": True},
    {"rope": None},
    {"rope": None, "rope_head_dim": 0},
    {"gate": "head"},
    {"gate": "element"},
    {"query_scale": {"beta": 0.1, "original_context": 4}},
    {"indexer": INDEXER},
    {"indexer": INDEXER, "d_q_latent": 7},
    {"indexer": {**INDEXER, "top_k": 11}},
    {"indexer": {**INDEXER, "top_k": 10}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_module(options: dict[str, Any], check_block: Callable[[BlockSpec], None]) -> None:
    check_block(MLASpec.model_validate({**BASE, **options}))


def test_chosen_keys_are_what_attention_pays_for() -> None:
    costs = {
        key: cost_of(MLASpec.model_validate({**BASE, "indexer": indexer}), 24, NormSpec())
        for key, indexer in {"none": None, "own": INDEXER, "reuse": {**INDEXER, "reuse": True}}.items()
    }
    seq_len = 9
    pairs = sum(min(query + 1, 4) for query in range(seq_len))
    for key in ("own", "reuse"):
        assert costs[key].flops(seq_len)["scores"] == 2 * 3 * (10 + 5) * pairs / seq_len
    assert costs["none"].flops(seq_len)["scores"] == 2 * 3 * (10 + 5) * (9 + 1) / 2
    assert set(costs["own"].flops(seq_len)) == {"", "scores", "indexer"}
    assert set(costs["reuse"].flops(seq_len)) == {"", "scores"}
    assert set(costs["own"].flops(4)) == {"", "scores"}  # nothing to choose among 4 keys
    assert not any(weight.name.startswith("indexer") for weight in costs["reuse"].weights())


def test_released_sizes() -> None:
    """Parameters of one attention of DeepSeek-V3, counted by hand from its published sizes; V3.2 adds the indexer."""
    sizes = {"num_heads": 128, "d_q_latent": 1536, "d_kv_latent": 512, "nope_head_dim": 128, "rope_head_dim": 64}
    spec = MLASpec.model_validate({**sizes, "v_head_dim": 128})
    expected = 7168 * 1536 + 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 7168
    assert sum(weight.size for weight in cost_of(spec, 7168, NormSpec()).weights()) == expected
    indexed = spec.replace(indexer={"num_heads": 64, "head_dim": 128, "top_k": 2048})
    added = 1536 * 64 * 128 + 7168 * 128 + 2 * 128 + 7168 * 64
    assert sum(weight.size for weight in cost_of(indexed, 7168, NormSpec()).weights()) == expected + added
    assert 61 * added == 671_877_929_216 - 671_026_404_352  # measured totals of V3.2 and V3


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_blocks_of_keys(top_k: int, check_block: Callable[[BlockSpec], None]) -> None:
    """In 11 tokens, 3 or more blocks of 4 leave nothing to choose."""
    indexer = {"num_heads": 2, "head_dim": 6, "block_size": 4, "top_k": top_k}
    spec = AttentionSpec.model_validate({"num_heads": 4, "num_kv_heads": 2, "indexer": indexer})
    check_block(spec)
    assert ("indexer" in cost_of(spec, 24, NormSpec()).flops(11)) == (top_k < 3)


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 5))
def test_chosen_pairs(seq_len: int, block_size: int, top_k: int) -> None:
    """A query's own block up to itself and top_k - 1 whole ones before it, as far as there are so many."""
    expected = sum(
        query % block_size + 1 + min(query // block_size, top_k - 1) * block_size for query in range(seq_len)
    )
    assert chosen_pairs(seq_len, block_size, top_k) == expected
