"""FLOPs of whole models against torch's counter and against what parameter counts imply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import zoo
from zoo.decoder import build
from zoo.plan.flops import count_flops
from zoo.spec import ModelSpec, decode

TINY: dict[str, Any] = {
    "d_model": 16,
    "vocab_size": 50,
    "attention": {"type": "gqa", "num_heads": 4, "num_kv_heads": 2, "qk_norm": "head"},
    "local": {"type": "gqa", "num_heads": 2, "num_kv_heads": 1, "mask": "sliding", "window": 4},
    "mlp": {"type": "mlp", "d_ffn": 24},
    "moe": {"type": "moe", "num_experts": 6, "top_k": 2, "d_expert": 10, "num_shared_experts": 1},
    "kinds": {
        "dense": {"mixer": "attention", "ffn": "mlp"},
        "sparse": {"mixer": "local", "ffn": "moe"},
        "alone": {"ffn": "moe"},
    },
    "layers": "dense 2*(sparse alone)",
}


@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_counter_of_torch(tied: bool, count_with_torch: Callable[..., dict[str, int]]) -> None:
    spec = decode(ModelSpec, {**TINY, "head": {"tied": tied}})
    batch_size, seq_len = 3, 9
    counted = count_with_torch(build(spec), torch.randint(50, (batch_size, seq_len)))
    flops = count_flops(spec, seq_len, skip_masked=False)
    tokens = batch_size * seq_len
    assert flops.total * tokens == counted["Global"]
    assert flops.by_block["head"] * tokens == counted["Decoder.head"]
    dense = flops.by_block["attention"] + flops.by_block["attention.scores"] + flops.by_block["mlp"]
    assert dense * tokens == counted["Decoder.layers.0"]


@pytest.mark.parametrize("mtp", [{"depth": 1}, {"depth": 2}, {"depth": 2, "shared": True}])
def test_multi_token_prediction_is_training(
    mtp: dict[str, Any], count_with_torch: Callable[..., dict[str, int]]
) -> None:
    on, off = (
        decode(ModelSpec, {**TINY, "mtp": {"layers": "sparse dense", "enabled": enabled, **mtp}})
        for enabled in (True, False)
    )
    model, tokens = build(on), torch.randint(50, (2, 9))
    flops = count_flops(on, 9, skip_masked=False)
    assert count_with_torch(model, tokens)["Global"] == flops.total * 18
    assert count_with_torch(model.loss, tokens, tokens)["Global"] == (flops.total + flops.mtp) * 18
    assert flops.training == 3 * (flops.total + flops.mtp)
    assert (on.flops(9).total, 0) == (off.flops(9).total, off.flops(9).mtp)


def test_masked_pairs_are_skipped() -> None:
    flops, dense = (count_flops(decode(ModelSpec, TINY), 9, skip_masked=skip) for skip in (True, False))
    assert flops.by_block.keys() == dense.by_block.keys()
    assert flops.by_block["attention.scores"] == dense.by_block["attention.scores"] * 5 / 9
    assert flops.by_block["local.scores"] == pytest.approx(dense.by_block["local.scores"] * (1 + 2 + 3 + 6 * 4) / 81)
    assert all(flops.by_block[row] == dense.by_block[row] for row in flops.by_block if not row.endswith(".scores"))


@pytest.mark.parametrize("name", zoo.list_models())
def test_products_follow_from_the_active_parameters(name: str, load_model: Callable[[str], ModelSpec]) -> None:
    """Two FLOPs for each active parameter that is a matrix; vectors are a small rest. Indexers mix in their row."""
    spec = load_model(name)
    flops, params = spec.flops(4096), spec.params()
    indexers = {row for row in params.by_block if row.endswith(".indexer")}
    products = sum(count for row, count in flops.by_block.items() if row in {*params.by_block, "head"} - indexers)
    tables = params.by_block["embed"].active - (params.embedding if params.tied else 0)
    others = tables + sum(params.by_block[row].active for row in ("norms", *indexers))
    assert products == pytest.approx(2 * (params.active - others), rel=1e-3)
    assert sum(flops.by_block.values()) == flops.total
    assert flops.training == 3 * flops.total


def test_a_sequence_has_tokens() -> None:
    with pytest.raises(ValueError, match="seq_len must be at least 1, found 0"):
        decode(ModelSpec, TINY).flops(0)
