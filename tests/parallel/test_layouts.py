"""Pipelines, sequences cut among processes, and all kinds of parallelism together: as in `test_equality`."""

from __future__ import annotations

import os

import pytest
import torch

from tests.parallel import cases
from tests.parallel.conftest import Reference, check
from tests.parallel.pool import Pool
from zoo.plan.layout import Layout

# `mixers` has one of each mixer over rows of several documents; `options` shares its embedding between both ends.
LAYOUTS = [
    ("hybrid", Layout(pp=2, vp=2), 4),
    ("options", Layout(pp=2, cp=2), 4),
    ("mixers", Layout(cp=2), 2),
    ("mla_moe", Layout(pp=2, dp=2, ep=2, shard=2), 4),
    ("hybrid", Layout(cp=2, tp=2, ep=2), 2),
]
PIPELINES = [
    ("dense", Layout(pp=2), 4),
    ("dense", Layout(pp=2, vp=2), 4),
    ("dense", Layout(pp=4), 4),
    ("moe", Layout(pp=2), 4),
    ("mla_moe", Layout(pp=2), 4),
    ("mla_moe", Layout(pp=4), 2),
    ("hybrid", Layout(pp=2), 4),
    ("hybrid", Layout(pp=4), 8),
    ("hybrid", Layout(pp=8), 8),
    ("hybrid", Layout(pp=2, vp=4), 4),
    ("options", Layout(pp=2), 4),
    ("options", Layout(pp=4), 2),
    ("moe_options", Layout(pp=2), 4),
    ("mixers", Layout(pp=4), 4),
]
SEQUENCES = [
    ("dense", Layout(cp=2), 2),
    ("dense", Layout(cp=4), 2),
    ("moe", Layout(cp=2), 2),
    ("mla_moe", Layout(cp=2), 2),
    ("mla_moe", Layout(cp=4), 2),
    ("hybrid", Layout(cp=2), 2),
    ("hybrid", Layout(cp=4), 2),
    ("options", Layout(cp=4), 2),
    ("mixers", Layout(cp=4), 2),
]
COMBINATIONS = [
    ("dense", Layout(dp=2, pp=2, shard=2), 4),
    ("dense", Layout(tp=2, cp=2, pp=2), 4),
    ("dense", Layout(dp=4, pp=2, shard=2), 4),
    ("dense", Layout(dp=2, cp=2, tp=2, shard=4), 2),
    ("moe", Layout(dp=2, pp=2, vp=2, ep=2), 4),
    ("moe", Layout(cp=2, ep=2), 2),
    ("moe", Layout(dp=2, cp=2, tp=2, ep=8), 2),
    ("moe", Layout(dp=2, cp=2, pp=2, ep=4, shard=4), 4),
    ("mla_moe", Layout(pp=2, tp=2, ep=2), 4),
    ("mla_moe", Layout(dp=2, pp=2, vp=2, ep=2, shard=2), 4),
    ("mla_moe", Layout(cp=2, tp=2, etp=2), 2),
    ("mla_moe", Layout(dp=2, tp=2, pp=2, ep=2, etp=2, shard=2), 4),
    ("mla_moe", Layout(dp=2, cp=2, pp=2, ep=4, shard=2), 4),
    ("hybrid", Layout(dp=2, pp=2, shard=2), 4),
    ("hybrid", Layout(cp=2, pp=2), 4),
    ("hybrid", Layout(cp=2, pp=2, vp=2), 4),
    ("hybrid", Layout(dp=2, tp=2, pp=2, vp=2, ep=2), 4),
    ("hybrid", Layout(cp=2, tp=2, pp=2, ep=4, shard=2), 4),
    ("options", Layout(dp=2, cp=2, pp=2, shard=4), 4),
    ("options", Layout(tp=2, pp=2), 4),
    ("moe_options", Layout(cp=2, tp=2, pp=2, etp=2), 4),
    ("mixers", Layout(dp=2, cp=2, pp=2, shard=4), 4),
]
"""Up to 8 processes on 2 cores take minutes: these run with ZOO_ALL_LAYOUTS=1."""
if os.environ.get("ZOO_ALL_LAYOUTS"):
    LAYOUTS += PIPELINES + SEQUENCES + COMBINATIONS


@pytest.mark.parametrize(("name", "layout", "micro_batches"), LAYOUTS, ids=str)
def test_fp64(name: str, layout: Layout, micro_batches: int, pool: Pool, reference: Reference) -> None:
    path = reference(name, torch.float64, micro_batches)
    answers = pool.run(
        layout.num_devices, cases.compare, name, torch.float64, layout, path, micro_batches=micro_batches
    )
    check(answers, bar=1e-9)


@pytest.mark.parametrize(("name", "layout"), [("mla_moe", Layout(pp=2, cp=2))], ids=str)
def test_fp32(name: str, layout: Layout, pool: Pool, reference: Reference) -> None:
    path = reference(name, torch.float32)
    check(pool.run(4, cases.compare, name, torch.float32, layout, path), bar=1e-5)


@pytest.mark.parametrize("layout", [Layout(cp=2, pp=2)], ids=str)
def test_with_recomputed_layers(layout: Layout, pool: Pool, reference: Reference) -> None:
    path = reference("hybrid", torch.float64, 4)
    check(pool.run(4, cases.compare, "hybrid", torch.float64, layout, path, "layer", 4), bar=1e-9)
