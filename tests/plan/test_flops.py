"""FLOPs of whole models against torch's counter and against what parameter counts imply."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.decoder import build
from zoo.plan.flops import count_flops
from zoo.plan.trunk import slot_costs
from zoo.spec import DeltaSpec, Mamba2Spec, ModelSpec, decode
from zoo.spec.block import BlockSpec
from zoo.spec.pattern import expand
from zoo.spec.twin import shrink

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


class Counted(NamedTuple):
    """FLOPs of a token as torch counts them."""

    loss: float
    """Forward to the loss, which makes the gradients of its logits along the way."""
    backward: float


LENGTH = 24
"""Tokens of a twin's sequence: more than its chunks, the keys that it chooses and its blocks of them."""


@cache
def count_training(description: str) -> Counted:
    """Of a training step on one sequence; many releases have the same twin. `description` is JSON."""
    spec = decode(ModelSpec, json.loads(description))
    model, tokens = build(spec), torch.randint(spec.vocab_size, (1, LENGTH))
    for moe in model.moe_layers().values():
        moe.experts.backend = "grouped"  # torch counts nothing in its own grouped product
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model.loss(tokens, tokens).total
        forward = counter.get_total_flops()
        loss.backward()
    return Counted(forward / LENGTH, (counter.get_total_flops() - forward) / LENGTH)


def blocks_of(spec: ModelSpec) -> Iterator[tuple[str, BlockSpec]]:
    """The slot and the description of every block of every layer that is trained."""
    further = expand(spec.mtp.layers) * spec.mtp.depth if spec.mtp is not None and spec.mtp.enabled else ()
    for kind in (spec.kinds[name] for name in (*spec.layer_kinds, *further)):
        yield from ((slot, spec.slots[slot]) for slot in (kind.mixer, kind.ffn, kind.beside) if slot)


def beyond_twice_the_forward(spec: ModelSpec) -> float:
    """What the backward pass takes beyond two products for each product of the forward pass, FLOPs a token.

    These are the differences between the planner's convention, by which training is three times the forward pass, and
    what is executed:
    - The choice of keys has no gradient.
    - Mamba-2 keeps no states and no scores: it makes the states, what is read of them and the scores again.
    - The gradient of the inverse of a triangle is two products of whole squares.
    - torch has no formula for products that are added in place, of which the delta rule's backward pass has two.
    """
    costs, total = slot_costs(spec), 0.0
    for slot, block in blocks_of(spec):
        total -= 2 * costs[slot].flops(LENGTH, skip_masked=False).get("indexer", 0)
        if isinstance(block, Mamba2Spec):
            whole, rest = divmod(LENGTH, block.chunk_size)
            pairs = (whole * block.chunk_size**2 + rest**2) / LENGTH
            total += 2 * block.d_state * (2 * block.d_inner + pairs * block.num_groups)
        elif isinstance(block, DeltaSpec):
            size = min(block.chunk_size, 32)
            inverse, triangle = 2 * size**3, size * (size**2 - 1) / 3
            in_place = 2 * size * block.head_dim * block.v_width
            total += 2 * block.num_heads * (inverse - 2 * triangle - in_place) / LENGTH
    return total


@pytest.mark.parametrize("name", zoo.list_models())
def test_training_every_twin_equals_the_counter_of_torch(name: str, load_model: Callable[[str], ModelSpec]) -> None:
    """To the last FLOP, with multi-token prediction where it is described, and against what the planner calls dense:
    every pair of a query and a key and every square of a chunk counts, masked or not."""
    twin = shrink(load_model(name)).replace(name="twin")
    if twin.mtp is not None:
        twin = twin.replace(mtp=twin.mtp.replace(enabled=True))
    counted, flops = count_training(json.dumps(twin.to_dict())), count_flops(twin, LENGTH, skip_masked=False)
    heads = 1 + (twin.mtp.depth if twin.mtp is not None else 0)
    logits = heads * flops.by_block["head"]
    assert counted.loss == pytest.approx(flops.total + flops.mtp + 2 * logits, rel=1e-9)
    expected = flops.training - counted.loss + beyond_twice_the_forward(twin)
    assert counted.backward == pytest.approx(expected, rel=1e-9)


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
