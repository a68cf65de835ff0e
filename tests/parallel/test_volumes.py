"""What travels between processes is what the planner counts, to the last element."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parallel import cases
from tests.parallel.pool import Pool
from zoo.blocks.router import Routing
from zoo.decoder import Decoder
from zoo.parallel import World, accumulate, parallelize
from zoo.parallel.pipeline import _Place
from zoo.plan.layout import Layout, Points
from zoo.plan.products import uses_of
from zoo.plan.traffic import traffic_of

ROWS, SEQ_LEN = 4, 16


class Volumes(TorchDispatchMode):
    """Elements of activations that a process sends to others, by the axis along which it does, forward and backward."""

    def __init__(self, groups: dict[str, DeviceMesh]) -> None:
        super().__init__()
        self.names = {mesh.get_group().group_name: name for name, mesh in groups.items()}
        self.sizes = {mesh.get_group().group_name: mesh.size() for mesh in groups.values()}
        self.ranks = {mesh.get_group().group_name: mesh.get_local_rank() for mesh in groups.values()}
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, group = func._overloadpacket._qualified_op_name, args[-1] if args else None
        if name.startswith("_c10d_functional::") and group in self.names and args[0].is_floating_point():
            others = self.sizes[group] - 1
            if name.endswith("all_to_all_single"):
                splits = list(args[2])
                sent = (sum(splits) - splits[self.ranks[group]]) * args[0].shape[1]
            elif name.endswith("all_gather_into_tensor"):
                sent = args[0].numel() * others
            elif name.endswith("reduce_scatter_tensor"):
                sent = args[0].numel() * others // self.sizes[group]
            else:
                sent = 0
            self.sent[self.names[group]] += sent
        return result


def route_evenly(model: Decoder) -> None:
    """Let the tokens of every process choose all experts equally often."""
    for moe in model.moe_layers().values():
        router, num_experts, top_k = moe.router, moe.spec.num_experts, moe.spec.top_k
        decide = router.route

        def route(logits: Tensor, decide: Any = decide, num_experts: int = num_experts, top_k: int = top_k) -> Routing:
            found = decide(logits)
            even = torch.arange(found.indices.numel(), device=logits.device).view_as(found.indices) % num_experts
            return Routing(found.weights, even, found.scores, found.logits)

        router.route = route  # type: ignore[method-assign]


def moved(name: str, layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
    """What one process sends in the forward pass of a micro-batch, and in its backward pass."""
    world = World.of(layout)
    model = cases.model_of(cases.spec_of(name), torch.float32)
    route_evenly(model)
    parallelize(model, world)
    tokens = torch.zeros(ROWS, SEQ_LEN, dtype=torch.int64)
    groups = {"cp": world.cp, "ep": world.experts["ep"], "etp": world.experts["etp"]}
    with Volumes({axis: mesh for axis, mesh in groups.items() if mesh.size() > 1}) as volumes:
        losses = model.loss(tokens, tokens)
        there = dict(volumes.sent)
        losses.total.backward()
    return there, {kind: sent - there[kind] for kind, sent in volumes.sent.items()}


def planned(name: str, layout: Layout, kind: str) -> float:
    """Elements that a device sends in a forward pass of a micro-batch of so many rows, all stages together."""
    spec = cases.spec_of(name)
    points = Points.of([layout], seq_len=SEQ_LEN, global_batch=ROWS * layout.dp, micro_batch=ROWS)
    return float(getattr(traffic_of(spec, uses_of(spec, mtp=False), points), kind)[0])


VOLUMES = [
    ("moe", Layout(dp=2, ep=2), ("ep",)),
    ("moe_options", Layout(dp=2, ep=2), ("ep",)),  # of latents
    ("hybrid", Layout(dp=2, tp=2, ep=2, etp=2), ("ep", "etp")),
    ("moe", Layout(cp=2, tp=2), ("cp",)),
]
PASSED_ON = [Layout(pp=2, vp=2)]
if os.environ.get("ZOO_ALL_LAYOUTS"):
    VOLUMES += [
        ("moe", Layout(dp=4, ep=4), ("ep",)),
        ("mla_moe", Layout(dp=2, tp=2, ep=4), ("ep",)),
        ("dense", Layout(cp=2), ("cp",)),
        ("dense", Layout(cp=4), ("cp",)),
    ]
    PASSED_ON += [Layout(pp=2), Layout(pp=2, tp=2)]


@pytest.mark.parametrize(("name", "layout", "kinds"), VOLUMES, ids=str)
def test_as_many_bytes_as_the_planner_counts(name: str, layout: Layout, kinds: tuple[str, ...], pool: Pool) -> None:
    for there, back in pool.run(layout.num_devices, moved, name, layout):
        for kind in kinds:
            assert there[kind] == back[kind] == planned(name, layout, kind)
            assert there[kind] > 0


def passed_on(layout: Layout) -> list[int]:
    """Elements that the stages of this process send on, and back, in a step of two micro-batches."""
    world = World.of(layout)
    model = parallelize(cases.model_of(cases.spec_of("hybrid"), torch.float32), world)
    tokens, sent = torch.zeros(2 * ROWS, SEQ_LEN, dtype=torch.int64), []
    with ExitStack() as stack:
        for method in ("get_fwd_send_ops", "get_bwd_send_ops"):
            made: list[list[dist.P2POp]] = []
            make = getattr(_Place, method)
            sent.append(made)
            stack.enter_context(patch.object(_Place, method, _noting(make, made)))
        accumulate(model, (tokens, tokens), ROWS, nullcontext, world)
    return [sum(op.tensor.numel() for ops in made for op in ops) for made in sent]


def _noting(make: Any, made: list[list[dist.P2POp]]) -> Any:
    def noted(place: _Place, chunk: int) -> list[dist.P2POp]:
        made.append(make(place, chunk))
        return made[-1]

    return noted


@pytest.mark.parametrize("layout", PASSED_ON, ids=str)
def test_stages_pass_on_the_stream_alone(layout: Layout, pool: Pool) -> None:
    found = np.array(pool.run(layout.num_devices, passed_on, layout))
    # The planner's is what every device sends, the last one of all stages included, which has nobody to send to.
    steps = 2 * planned("hybrid", layout, "pp") * layout.tp
    edges = layout.pp * layout.vp - 1
    assert (found.sum(0) == steps / layout.vp * edges).all()
