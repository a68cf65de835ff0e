"""The list of operations of a step, against what torch counts when the step is really done."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from zoo.decoder import build
from zoo.plan.local import Op, StepOps
from zoo.spec.train import AdamWSpec, MuonSpec
from zoo.train.prediction import known_step_ops
from zoo.train.trace import step_ops

ADAMW = AdamWSpec(lr=1e-3)
NAMES = [
    "tiny_dense",
    "tiny_moe",
    "deepseek_v3",
    "nemotron_3_nano_30b_a3b",
    "qwen3_next_80b_a3b",
    "gemma3_1b",
    "phi4_mini",
]


class Products(TorchDispatchMode):
    """FLOPs of matrix products that are really done."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ("mm", "bmm"):
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        elif name in ("addmm", "baddbmm", "baddbmm_"):
            self.flops += 2 * args[1].numel() * args[2].shape[-1]
        return func(*args, **(kwargs or {}))


def flops_of(ops: StepOps) -> int:
    return sum(2 * math.prod(op.size) * times for op, times in ops.passes.items() if op.kind in ("product", "grouped"))


@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_a_real_step(name: str) -> None:
    spec = zoo.shrink(zoo.load(name))
    ops = step_ops(spec, 2, 32, ADAMW, backend="grouped")
    model = build(spec)
    for moe in model.moe_layers().values():
        moe.experts.backend = "grouped"
    tokens = torch.randint(0, spec.vocab_size, (2, 32))
    with Products() as counted:
        model.loss(tokens, tokens).total.backward()
    # How many rows an expert gets moves FLOPs between experts, not their sum.
    assert flops_of(ops) == pytest.approx(counted.flops, rel=0.01)


def test_layers_are_counted_not_walked() -> None:
    spec = zoo.load("tiny_dense")
    few, many = (step_ops(spec.replace(layers=f"{number}*dense"), 1, 16, ADAMW) for number in (3, 300))
    attend = [sum(times for op, times in ops.passes.items() if op.kind == "attend") for ops in (few, many)]
    assert attend == [3, 300]
    again = [sum(ops.layers_again.values()) for ops in (few, many)]
    assert again[1] == 100 * again[0]


def test_experts_get_rows_evenly() -> None:
    spec = zoo.load("tiny_moe")
    moe = spec.slots["moe"]
    ops = step_ops(spec, 1, 128, ADAMW, backend="grouped")
    rows = Counter[int]()
    for op, times in ops.passes.items():
        if op.kind == "product" and op.size[2:] == (2 * moe.d_expert, spec.d_model):
            rows[op.size[1]] += times
    assert rows == {128 * moe.top_k // moe.num_experts: spec.num_layers * moe.num_experts}


def test_an_optimizer_updates_every_parameter_once() -> None:
    spec = zoo.load("tiny_moe")
    muon = step_ops(spec, 1, 16, MuonSpec(lr=1e-3, adamw=ADAMW))
    adamw = step_ops(spec, 1, 16, ADAMW)
    assert adamw.fused_elements == adamw.elements == muon.elements == spec.params().total
    assert 0 < muon.fused_elements < muon.elements
    assert not adamw.update
    assert sum(times for op, times in muon.update.items() if op.kind == "product") > 0


def test_the_list_is_kept_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = zoo.load("tiny_dense")
    made = known_step_ops(spec, 1, 16, ADAMW, "auto")
    monkeypatch.setattr("zoo.train.trace.step_ops", None)  # it is not asked again
    kept = known_step_ops(spec, 1, 16, ADAMW, "auto")
    assert kept == made
    assert Op("view") in kept.passes
