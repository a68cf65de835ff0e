"""Meshes, refusals, and how the parts of a model lie on a mesh."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import small_spec
from tests.parallel import cases
from tests.parallel.pool import Pool
from zoo.blocks.base import Context
from zoo.decoder import build
from zoo.parallel import World, parallelize
from zoo.plan.layout import Layout
from zoo.spec.base import ConfigError
from zoo.spec.model import ModelSpec


def places(layout: Layout) -> tuple[list[int], list[int]]:
    world = World.of(layout)
    return list(world.dense.get_coordinate() or ()), list(world.experts.get_coordinate() or ())


def test_neighbours_share_tensors_then_experts(pool: Pool) -> None:
    found = pool.run(8, places, Layout(dp=4, tp=2, ep=2, shard=2))
    # pp, replicate, shard, tp and pp, replicate, shard, ep, etp.
    assert [dense for dense, _ in found] == [[0, r, s, t] for r in range(2) for s in range(2) for t in range(2)]
    assert [expert for _, expert in found] == [[0, r, s, e, 0] for r in range(2) for s in range(2) for e in range(2)]


def refusal(spec: ModelSpec, layout: Layout) -> str:
    try:
        parallelize(build(spec, device="meta"), World.of(layout))
    except ConfigError as error:
        return str(error)
    return ""


def refused_rows(length: int, padded: bool) -> str:
    world = World.of(Layout(tp=2))
    model = parallelize(build(small_spec()), world)
    tokens = torch.zeros(1, length, dtype=torch.int64)
    context = Context.of(tokens)
    context.padding = torch.zeros(1, dtype=torch.int64) if padded else None
    try:
        model.loss(tokens, tokens, context)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("length", "padded", "reason"),
    [(7, False, "train.seq_len: found 7; layout.tp, 2"), (8, True, "rows with padding"), (8, False, "")],
)
def test_rows_that_cannot_be_cut_are_refused(length: int, padded: bool, reason: str, pool: Pool) -> None:
    for message in pool.run(2, refused_rows, length, padded):
        assert reason in message
        assert bool(reason) == bool(message)


ATTENTION = {"type": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
REFUSED: list[tuple[dict[str, Any], Layout, str]] = [
    ({}, Layout(dp=3), "layout: found dp3, which is for 3 processes; there are 2"),
    ({"layers": "dense"}, Layout(pp=2, vp=2), "pp * vp, 2 * 2, must not exceed the 1 layers, embedding and head"),
    ({}, Layout(dp=2, ep=4), "their product must divide dp * cp * tp, 2"),
    ({"attention": {**ATTENTION, "qk_norm": "full"}}, Layout(tp=2), "qk_norm full, which is taken over all heads"),
    ({"attention": {**ATTENTION, "num_heads": 3, "num_kv_heads": 3}}, Layout(tp=2), "tp 2 must divide the 1 heads"),
    ({"attention": {"type": "short_conv"}}, Layout(tp=2), "layers.1.mixer (ShortConv) cannot be cut"),
    ({"mlp": {"type": "mlp", "d_ffn": 31}}, Layout(tp=2), "layers.0.ffn has d_ffn 31: tp must divide it"),
]


@pytest.mark.parametrize(("changes", "layout", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_run_is_refused(changes: dict[str, Any], layout: Layout, reason: str, pool: Pool) -> None:
    for message in pool.run(2, refusal, small_spec(**changes), layout):
        with pytest.raises(ConfigError, match=re.escape(reason)):
            raise ConfigError(message)


def shapes(layout: Layout) -> dict[str, tuple[list[int], list[int], str]]:
    model = parallelize(build(cases.spec_of("mla_moe")), World.of(layout))
    return {
        name: (list(parameter.shape), list(parameter.to_local().shape), str(parameter.placements))
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor)
    }


def test_names_and_whole_shapes_stay(pool: Pool) -> None:
    model = build(cases.spec_of("mla_moe"), device="meta")
    whole = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    found = pool.run(4, shapes, Layout(dp=2, tp=2, ep=4, shard=2))
    assert {name: shape for name, (shape, _, _) in found[0].items()} == whole
    # Two of eight experts. Half of what tp cuts; of that, a half for each of the two processes with other rows.
    assert found[3]["layers.1.ffn.experts.down"][1] == [2, 64, 48]
    assert found[3]["layers.0.ffn.up.weight"][1] == [64, 64]
    assert found[3]["layers.0.mixer.kv_down.weight"][1] == [8, 64]
    assert found[3]["layers.0.mixer.out.weight"][1] == [32, 32]


class Traffic(TorchDispatchMode):
    """Elements that all-to-alls of activations send to others."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.sent = rank, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket is torch.ops._c10d_functional.all_to_all_single and args[0].is_floating_point():
            splits = list(args[2])
            self.sent += (sum(splits) - splits[self.rank]) * args[0].shape[1]
        return func(*args, **(kwargs or {}))


def exchanged(layout: Layout) -> tuple[int, int]:
    world = World.of(layout)
    model = parallelize(cases.model_of(cases.spec_of("moe"), torch.float32), world)
    rank = world.experts.get_local_rank("ep")
    inputs, targets = cases.own_rows(cases.batch_of(model.spec, 0), rank, layout.dp)
    with Traffic(rank) as traffic:
        model.loss(inputs, targets)
    counts = torch.stack([moe.tokens_per_expert for moe in model.moe_layers().values()])
    away = int(counts.sum() - counts.view(-1, layout.ep, 8 // layout.ep)[:, rank].sum())
    return traffic.sent, away * model.spec.d_model


def test_dispatch_moves_the_rows_that_go_elsewhere_and_come_back(pool: Pool) -> None:
    answers = pool.run(4, exchanged, Layout(dp=4, ep=4))
    # What one process sends, the others send back: only the sums of both ways are equal.
    assert sum(sent for sent, _ in answers) == 2 * sum(away for _, away in answers)
