"""zoo's own training on the processor at hand, as an engine of the planner."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoo
import zoo.hardware
from zoo.plan.local import Rates, step_seconds
from zoo.plan.own_memory import peak_memory
from zoo.spec.base import ConfigError
from zoo.spec.train import AdamWSpec
from zoo.train.trace import step_ops

KINDS = ("stream", "math", "strided", "reduce", "select", "gather", "sort", "scan")
RATES = Rates(
    op_s=1e-6,
    plain_op_s=1e-6,
    curves={kind: [(1e3, 1e-7), (1e7, 1e-2)] for kind in KINDS},
    products=[(stack, size, size, size, 2e-11 * stack * size**3) for stack in (1, 8) for size in (16, 32, 64, 512)],
    attention={name: [(64, 32, 1e-10), (256, 32, 1e-10), (256, 64, 1e-10)] for name in ("causal", "causal_back")},
    adamw=(1e-9, 1e-6, 1e-4),
    clip=(1e-9, 1e-6, 1e-4),
)
SIZES = {"seq_len": 32, "global_batch": 4}

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="hardware=auto is the processor where there is no GPU"
)


@pytest.fixture(autouse=True)
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    speed = zoo.hardware.Speed({"fp32": 0.1, "bf16": 0.01}, 20.0, RATES)
    monkeypatch.setattr(zoo.hardware, "measure", lambda chip: speed)


@pytest.mark.parametrize(("recompute", "again"), [("none", False), ("full", True)])
def test_an_estimate_is_what_the_operations_take(recompute: str, again: bool) -> None:
    found = zoo.estimate("tiny_moe", "auto", micro_batch=2, precision="fp32", recompute=recompute, **SIZES)
    spec, adamw = zoo.load("tiny_moe"), AdamWSpec(lr=1e-3)
    assert found.engine == "zoo@measured"
    expected = step_seconds(step_ops(spec, 2, 32, adamw), RATES, micro_batches=2, again=again)
    assert found.step_time_s == pytest.approx(sum(expected.values()))
    recomputed = "layer" if again else "none"
    held = peak_memory(spec, batch_size=2, seq_len=32, optimizer=adamw, recompute=recomputed, grad_accumulation=2)
    assert found.total_memory_gib == pytest.approx(held.total)
    assert found.mfu == pytest.approx(found.flops.training * 128 / found.step_time_s / 1e11)


def test_a_plan_takes_the_quickest_micro_batch() -> None:
    made = zoo.plan("tiny_moe", "cpu", **SIZES)
    times = {
        size: zoo.estimate("tiny_moe", "cpu", micro_batch=size, precision="fp32", **SIZES).step_time_s
        for size in (1, 2, 4)
    }
    assert (made.best.engine, made.precision, made.recompute) == ("zoo@measured", "fp32", "none")
    assert made.step_time_s == pytest.approx(min(times.values()))
    assert made.micro_batch == min(times, key=lambda size: times[size])


def test_facts_of_the_chip_scale_what_depends_on_them() -> None:
    plain, quick = (
        zoo.estimate("tiny_moe", "auto", *changes, precision="fp32", **SIZES)
        for changes in ((), ("hardware.chip.tflops.fp32=0.2",))
    )
    assert quick.time_s["matmuls"] == pytest.approx(plain.time_s["matmuls"] / 2)
    assert quick.time_s["memory"] == plain.time_s["memory"]


def test_what_zoo_does_not_do_is_said() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer: found 'sgd'; the engine zoo trains with adamw or muon"):
        zoo.estimate("tiny_moe", "auto", optimizer="sgd", precision="fp32", **SIZES)
    assert not zoo.estimate("tiny_moe", "auto", precision="fp32", recompute="selective", **SIZES).fits
