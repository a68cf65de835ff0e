"""A parallel run computes what a single process does: losses, every gradient, the norm, the counts of experts."""

from __future__ import annotations

import os

import pytest
import torch

from tests.parallel import cases
from tests.parallel.conftest import Reference, check
from tests.parallel.pool import Pool
from zoo.plan.layout import Layout

# Wherever there are experts, half of them receive nothing, and so do the processes that hold only such.
LAYOUTS = [
    ("dense", Layout(dp=4, shard=2)),
    ("moe", Layout(dp=2, ep=2)),
    ("mla_moe", Layout(tp=2)),
    ("hybrid", Layout(dp=2, tp=2, ep=2, shard=2)),
    ("moe_options", Layout(tp=2)),
]
MORE_LAYOUTS = [
    ("dense", Layout(dp=2)),
    ("dense", Layout(dp=2, shard=2)),
    ("dense", Layout(tp=2)),
    ("dense", Layout(tp=4)),
    ("moe", Layout(tp=2)),
    ("moe", Layout(dp=4, tp=2, ep=4, shard=2)),
    ("mla_moe", Layout(tp=4, ep=2, etp=2)),
    ("mla_moe", Layout(dp=4, ep=2, shard=2)),
    ("mla_moe", Layout(dp=4, tp=2, ep=2, etp=2, shard=4)),
    ("hybrid", Layout(dp=2, ep=2, shard=2)),
    ("hybrid", Layout(dp=8, ep=8, shard=4)),
    ("options", Layout(dp=2, tp=2, shard=2)),
    ("moe_options", Layout(dp=2, tp=2, etp=2, shard=2)),
]
"""Up to 8 processes on 2 cores take minutes: these run with ZOO_ALL_LAYOUTS=1."""
if os.environ.get("ZOO_ALL_LAYOUTS"):
    LAYOUTS += MORE_LAYOUTS


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=lambda value: str(value))
def test_fp64(name: str, layout: Layout, pool: Pool, reference: Reference) -> None:
    path = reference(name, torch.float64)
    check(pool.run(layout.num_devices, cases.compare, name, torch.float64, layout, path), bar=1e-9)


@pytest.mark.parametrize(("name", "layout"), [("mla_moe", Layout(dp=2, ep=2, shard=2))], ids=str)
def test_fp32(name: str, layout: Layout, pool: Pool, reference: Reference) -> None:
    path = reference(name, torch.float32)
    check(pool.run(layout.num_devices, cases.compare, name, torch.float32, layout, path), bar=1e-5)


@pytest.mark.parametrize("layout", [Layout(dp=2, ep=2, shard=2)], ids=str)
def test_with_recomputed_layers(layout: Layout, pool: Pool, reference: Reference) -> None:
    path = reference("mla_moe", torch.float64)
    check(pool.run(2, cases.compare, "mla_moe", torch.float64, layout, path, "layer"), bar=1e-9)


@pytest.mark.parametrize("name", ["moe", "mla_moe", "hybrid", "moe_options"])
def test_the_loads_are_skewed(name: str, reference: Reference) -> None:
    """Of the runs above: experts without a token, in every layer of the first step, and clipping at work."""
    steps: list[cases.Step] = torch.load(reference(name, torch.float64), weights_only=False)
    for counts in steps[0].counts.values():
        assert (counts == 0).sum() >= 3
        assert counts.max() > 1.5 * counts.sum() / len(counts)
    assert all(step.norm > cases.CLIP for step in steps)
