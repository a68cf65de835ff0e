"""Parameter counts of whole models against independent counts and against the built modules."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.decoder import Decoder, build
from zoo.plan.trunk import named_weights
from zoo.spec import ModelSpec, decode

with open(Path(__file__).with_name("measured.csv"), newline="") as file:
    MEASURED = {row["name"]: row for row in csv.DictReader(file)}
"""Counts of the released models made with transformers on the meta device, see the fields of ParamCount."""

MODELS = zoo.list_models()

DENSE = {"mixer": "attention", "ffn": "mlp"}
TRUNK: dict[str, Any] = {
    "d_model": 16,
    "vocab_size": 50,
    "attention": {"type": "gqa", "num_heads": 4, "num_kv_heads": 2},
    "mlp": {"type": "mlp", "d_ffn": 20},
    "moe": {"type": "moe", "num_experts": 6, "top_k": 2, "d_expert": 10},
    "kinds": {
        "dense": DENSE,
        "sparse": {"ffn": "moe"},
        "alone": {"mixer": "attention"},
    },
    "layers": "2*dense 3*(alone sparse)",
}


@pytest.mark.parametrize("name", [name for name in MODELS if name in MEASURED])
def test_counts_equal_the_measured_ones(name: str, load_model: Callable[[str], ModelSpec]) -> None:
    count, measured = load_model(name).params(), MEASURED[name]
    found = {key: getattr(count, key) for key in ("total", "active", "active_without_lookup", "embedding")}
    assert found == {key: int(measured[key]) for key in found}


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_equal_the_module(
    name: str, load_model: Callable[[str], ModelSpec], check_names: Callable[..., None]
) -> None:
    """One layer of each kind: the others have the same weights."""
    spec = load_model(name)
    spec = spec.replace(layers=" ".join(dict.fromkeys(spec.layer_kinds)))
    with torch.device("meta"):
        check_names(named_weights(spec), Decoder(spec))


@pytest.mark.parametrize("name", MODELS)
def test_rows_sum_to_the_totals(name: str, load_model: Callable[[str], ModelSpec]) -> None:
    spec = load_model(name)
    count = spec.params()
    assert count.total == sum(share.total for share in count.by_block.values())
    assert count.active == sum(share.active for share in count.by_block.values())
    assert count.total == sum(weight.size for weight in named_weights(spec))


WIRINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer norm": {"norm": {"type": "layer", "bias": True}},
    "no norm weight": {"norm": {"weight": "none"}},
    "tied head": {"head": {"tied": True, "bias": True}},
    "positions": {"head": {"bias": True}, "embedding": {"positions": 16}},
    "beside": {"kinds": {**TRUNK["kinds"], "sparse": {"mixer": "attention", "ffn": "moe", "beside": "mlp"}}},
    "ffn placement": {"kinds": {**TRUNK["kinds"], "dense": {**DENSE, "ffn_placement": "post"}}},
    "kind's placement": {"kinds": {**TRUNK["kinds"], "dense": {**DENSE, "placement": "sandwich"}}},
    "layer scale": {"layer_scale": True},
}


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("options", WIRINGS.values(), ids=WIRINGS)
def test_every_way_to_wire_a_trunk(placement: str, options: dict[str, Any], check_names: Callable[..., None]) -> None:
    spec = decode(ModelSpec, {**TRUNK, "norm_placement": placement, **options})
    model = build(spec, device="meta")
    check_names(named_weights(spec), model)
    assert spec.params().total == sum(parameter.numel() for parameter in model.parameters())


def test_rows_follow_a_token() -> None:
    count = decode(ModelSpec, TRUNK).params()
    assert list(count.by_block) == ["embed", "attention", "mlp", "moe.router", "moe.experts", "norms", "head"]
    assert count.by_block["moe.experts"] == (3 * 6 * 3 * 10 * 16, 3 * 2 * 3 * 10 * 16)
    assert count.by_block["attention"] == (5 * 3 * 16 * 16, 5 * 3 * 16 * 16)
    assert count.by_block["embed"] == count.by_block["head"] == (800, 800)
    assert count.embedding == 800
    assert count.active - count.active_without_lookup == 800


def test_a_tied_table_counts_once() -> None:
    tied = decode(ModelSpec, {**TRUNK, "head": {"tied": True}}).params()
    untied = decode(ModelSpec, TRUNK).params()
    assert (untied.total - tied.total, untied.active - tied.active) == (800, 800)
    assert tied.active_without_lookup == tied.active


@pytest.mark.parametrize(
    "mtp", [{"layers": "sparse"}, {"layers": "alone sparse", "depth": 2}, {"depth": 3, "shared": True}]
)
def test_blocks_of_multi_token_prediction(mtp: dict[str, Any], check_names: Callable[..., None]) -> None:
    """Named when they are built; always counted, and never in the total."""
    trunk, mtp = decode(ModelSpec, TRUNK).params(), {"layers": "dense", **mtp}
    for enabled in (False, True):
        spec = decode(ModelSpec, {**TRUNK, "mtp": {**mtp, "enabled": enabled}})
        count, model = spec.params(), build(spec, device="meta")
        check_names(named_weights(spec), model)
        assert (count.total, count.active, count.by_block) == (trunk.total, trunk.active, trunk.by_block)
    assert trunk.mtp == 0
    assert count.total + count.mtp == sum(parameter.numel() for parameter in model.parameters())
