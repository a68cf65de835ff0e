"""The time of a step: many layouts as one by one, and what can only help never hurts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest

from zoo.plan.engine import Constants, Facts, Habits, engine_of, facts_of, reach_of
from zoo.plan.estimate import load_hardware
from zoo.plan.layout import Layout, Points
from zoo.plan.price import Run, price
from zoo.plan.step import step_of
from zoo.plan.work import imbalance, layers_of_stages, work_of
from zoo.spec.hardware import HardwareSpec
from zoo.spec.model import ModelSpec

LAYOUTS = [
    Layout(dp=64),
    Layout(tp=4, dp=16),
    Layout(tp=2, pp=4, vp=3, dp=8),
    Layout(pp=4, ep=8, dp=16),
    Layout(ep=64, dp=64),
    Layout(dp=64, shard=64, ep=8),
    Layout(dp=64, shard=8),
    Layout(cp=2, dp=32, ep=8),
    Layout(tp=2, ep=8, etp=2, dp=32),
]


@pytest.fixture(scope="module")
def sparse(load_model: Callable[[str], ModelSpec]) -> ModelSpec:
    return load_model("qwen3_30b_a3b")


@pytest.fixture(scope="module")
def h100() -> HardwareSpec:
    return load_hardware("h100_8x")


def points(layouts: list[Layout], recompute: str = "none") -> Points:
    return Points.of(layouts, seq_len=4096, global_batch=256, micro_batch=1, recompute=recompute)


def seconds(spec: ModelSpec, facts: Facts, layouts: list[Layout], c: Constants | None = None) -> np.ndarray:
    p = points(layouts)
    return step_of(work_of(spec, p), p, facts, c or engine_of("megatron").constants).total


@pytest.mark.parametrize("model", ["qwen3_30b_a3b", "llama3_8b", "deepseek_v3", "mixtral_8x7b"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_many_layouts_cost_what_each_costs(
    load_model: Callable[[str], ModelSpec], h100: HardwareSpec, model: str, recompute: str
) -> None:
    spec, engine = load_model(model), engine_of("megatron")
    together = price(spec, h100, points(LAYOUTS, recompute), Run(), engine)
    for index, layout in enumerate(LAYOUTS):
        alone = price(spec, h100, points([layout], recompute), Run(), engine)
        assert together.seconds[index] == pytest.approx(alone.seconds[0], rel=1e-12)
        assert together.total_gib[index] == pytest.approx(alone.total_gib[0], rel=1e-12)
        for name, value in together.step.parts.items():
            assert np.broadcast_to(value, len(LAYOUTS))[index] == pytest.approx(alone.step.parts[name][0], rel=1e-12)


@pytest.mark.parametrize("name", [f.name for f in fields(Facts) if f.name not in ("bits", "power", "domain")])
def test_better_hardware_is_never_slower(sparse: ModelSpec, h100: HardwareSpec, name: str) -> None:
    facts = facts_of(h100, "fp8", reach_of(h100.chip))
    better = replace(facts, **{name: getattr(facts, name) * 1.5})
    assert (seconds(sparse, better, LAYOUTS) <= seconds(sparse, facts, LAYOUTS) * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", ["peak", "byte_s", "near_byte_s", "far_byte_s"])
def test_every_resource_matters_to_some_layout(sparse: ModelSpec, h100: HardwareSpec, name: str) -> None:
    facts = facts_of(h100, "bf16", reach_of(h100.chip))
    worse = replace(facts, **{name: getattr(facts, name) / 4})
    assert (seconds(sparse, worse, LAYOUTS) > seconds(sparse, facts, LAYOUTS) * 1.02).any()


def test_a_step_is_no_faster_than_its_arithmetic(sparse: ModelSpec, h100: HardwareSpec) -> None:
    facts = facts_of(h100, "bf16", reach_of(h100.chip))
    flops = sparse.flops(4096).training * 256 * 4096
    devices = np.array([layout.num_devices for layout in LAYOUTS])
    assert (seconds(sparse, facts, LAYOUTS) > flops / devices / facts.peak).all()


def test_pipelines_wait_as_their_schedule_says(sparse: ModelSpec, h100: HardwareSpec) -> None:
    facts = facts_of(h100, "bf16", reach_of(h100.chip))
    c = replace(engine_of("megatron").constants, bubble=1.0)
    p = points([Layout(pp=4, dp=2), Layout(pp=4, vp=3, dp=2)])
    parts = step_of(work_of(sparse, p), p, facts, c).parts
    once = ("head", "bubble", "dp", "optimizer", "fixed", "jitter")
    work = sum(parts[name] for name in parts if name not in once)  # only the last stage has a head to wait for
    np.testing.assert_allclose(parts["bubble"] / work, [3 / 128, 1 / 128], rtol=1e-9)


def test_recomputing_costs_up_to_a_third_more(sparse: ModelSpec, h100: HardwareSpec) -> None:
    run, engine = Run(), engine_of("megatron")
    kept = price(sparse, h100, points(LAYOUTS), run, engine).seconds
    again = price(sparse, h100, points(LAYOUTS, "full"), run, engine).seconds
    assert (again > kept).all()
    assert (again < kept * 1.4).all()


def test_learned_routers_load_unevenly(sparse: ModelSpec, h100: HardwareSpec) -> None:
    balanced, learned = (
        price(sparse, h100, points(LAYOUTS), Run(balanced=flag), engine_of("megatron")).seconds
        for flag in (True, False)
    )
    assert (learned > balanced).all()
    # measured slow-downs of experts at 1, 8, 64 and 128 devices, the milder skew of throughput_notes.md, section 3.3
    np.testing.assert_allclose(imbalance(np.array([1.0, 8.0, 64.0, 128.0])), [1.05, 1.33, 2.08, 2.6], rtol=0.08)


def test_graphs_spare_the_host(sparse: ModelSpec, h100: HardwareSpec) -> None:
    times = [price(sparse, h100, points(LAYOUTS), Run(graphs=n), engine_of("megatron")).seconds for n in (0, 1, 2)]
    assert (times[0] > times[1]).all()
    assert (times[1] > times[2]).all()


def test_the_last_stage_lacks_a_layer_for_the_head() -> None:
    # 72 and 70 layers on 12 stages: 6 on each, or 5 on the first and on the last
    for num_layers, pp, expected in ((72, 12, (6, 6)), (70, 12, (6, 5)), (126, 8, (16, 15)), (48, 1, (48, 48))):
        fullest, last = layers_of_stages(num_layers, np.array([float(pp)]))
        assert (fullest[0], last[0]) == expected


def test_a_head_on_a_full_stage_keeps_the_others_waiting(sparse: ModelSpec, h100: HardwareSpec) -> None:
    facts, c = facts_of(h100, "bf16", reach_of(h100.chip)), engine_of("megatron").constants
    p = points([Layout(pp=4, dp=2), Layout(dp=8)])
    parts = {n: step_of(work_of(sparse.replace(layers=f"{n}*sparse"), p), p, facts, c).parts for n in (46, 48)}
    assert parts[48]["head"][0] == pytest.approx(4 * parts[48]["head"][1])  # a quarter of the replicas, 4 times as busy
    assert parts[46]["head"][0] < parts[48]["head"][0]


def test_each_device_has_the_whole_stream_without_sequence_parallelism(sparse: ModelSpec, h100: HardwareSpec) -> None:
    p = points([Layout(dp=64), Layout(tp=4, dp=16)])
    work = work_of(sparse, p)
    # each block norms and adds to its input of d_model channels; three quarters of it are others' otherwise
    np.testing.assert_allclose(work.repeated, [0.0, 2 * 2 * 48 * 2048 * 4096 * 3 / 4], rtol=1e-9)
    facts, c = facts_of(h100, "bf16", reach_of(h100.chip)), engine_of("megatron").constants
    shared, whole = (step_of(work, p, facts, c, Habits(sequence_parallel=flag)).parts for flag in (True, False))
    assert whole["memory"][0] == shared["memory"][0]
    assert whole["memory"][1] > shared["memory"][1]
    # an all-reduce forward and one back, where a gather more is needed of what is shared
    assert whole["tp"][1] == pytest.approx(shared["tp"][1] * 4 / 5)


def test_hosts_that_wait_for_kernels_add_their_time(sparse: ModelSpec, h100: HardwareSpec) -> None:
    facts = facts_of(h100, "bf16", reach_of(h100.chip))
    c = replace(engine_of("megatron").constants, micro_s=0.0, launch_s=1e-5, wake_s=3e-5, pace=1.0, pace_moe=1.0)
    p = points([Layout(dp=64)])
    work = work_of(sparse, p)
    host = step_of(work, p, facts, c, Habits(blocking=True)).parts["host"]
    assert host == pytest.approx(4 * 3 * work.kernels * 4e-5)  # four micro-batches, backward twice forward
    assert host > step_of(work, p, facts, c).parts["host"]
