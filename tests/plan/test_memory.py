"""Memory: additive, shared as sharding says, and close to peaks that others measured."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.planner_memory import measured, predicted
from benchmarks.planner_rows import machine, model_of, runs
from tests.models import MLP, SLIDING, small_spec
from zoo.plan.engine import engine_of
from zoo.plan.layout import Layout, Points
from zoo.plan.memory import GIB, Storage, memory_of, total
from zoo.plan.price import Run, price
from zoo.spec.base import decode
from zoo.spec.model import ModelSpec


def memory(
    spec: ModelSpec, layout: Layout, recompute: str = "none", micro_batch: int = 1, **storage: object
) -> dict[str, float]:
    batch = 64 * layout.dp * micro_batch
    p = Points.of([layout], seq_len=4096, global_batch=batch, micro_batch=micro_batch, recompute=recompute)
    found = memory_of(spec, p, Storage(**storage))  # type: ignore[arg-type]
    return {name: float(value[0]) for name, value in found.items()}


@pytest.fixture(scope="module")
def dense(load_model: Callable[[str], ModelSpec]) -> ModelSpec:
    return load_model("llama3_8b")


@pytest.fixture(scope="module")
def sparse(load_model: Callable[[str], ModelSpec]) -> ModelSpec:
    return load_model("qwen3_30b_a3b")


@pytest.mark.parametrize("name", ["llama3_8b", "qwen3_30b_a3b", "tiny_moe"])
def test_one_device_holds_every_parameter(load_model: Callable[[str], ModelSpec], name: str) -> None:
    spec = load_model(name)
    found, count = memory(spec, Layout()), spec.params().total
    assert found["weights"] == pytest.approx(2 * count / GIB, rel=1e-3)
    assert found["gradients"] == pytest.approx(4 * count / GIB, rel=1e-3)
    assert found["optimizer"] == pytest.approx(12 * count / GIB, rel=1e-3)


def test_devices_of_tensor_parallelism_share_matrices(dense: ModelSpec) -> None:
    whole, shared = memory(dense, Layout()), memory(dense, Layout(tp=8))
    for name in ("weights", "gradients", "optimizer", "activations", "logits"):
        assert shared[name] == pytest.approx(whole[name] / 8, rel=1e-2)


def test_expert_parallelism_shares_experts_and_nothing_else(sparse: ModelSpec) -> None:
    experts = sparse.params().by_block["moe.experts"].total
    whole, shared = memory(sparse, Layout(dp=8)), memory(sparse, Layout(dp=8, ep=8))
    assert whole["weights"] - shared["weights"] == pytest.approx(2 * experts * 7 / 8 / GIB, rel=1e-6)
    assert shared["activations"] == whole["activations"]
    assert shared["dispatch"] == whole["dispatch"]  # tokens are traded, not removed
    assert shared["optimizer"] == pytest.approx(whole["optimizer"])  # states were spread over replicas before


def test_states_are_spread_over_replicas(dense: ModelSpec) -> None:
    one, eight = memory(dense, Layout()), memory(dense, Layout(dp=8))
    assert eight["optimizer"] == pytest.approx(one["optimizer"] / 8)
    assert eight["weights"] == one["weights"]
    assert memory(dense, Layout(dp=8), spread_states=False)["optimizer"] == pytest.approx(one["optimizer"])


def test_full_sharding_shares_all_states(dense: ModelSpec) -> None:
    one, eight = memory(dense, Layout()), memory(dense, Layout(dp=8, shard=8))
    states = sum(one[name] for name in ("weights", "gradients", "optimizer"))
    shared = sum(eight[name] for name in ("weights", "gradients", "optimizer"))
    assert states / 8 * 0.85 < shared < states / 8 * 1.25  # and the weights of two layers, gathered


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6))
def test_layers_add_up(first: int, second: int) -> None:
    def of(layers: int) -> dict[str, float]:
        return memory(small_spec(layers=f"{layers}*(dense sparse)"), Layout())

    one, two, both = of(first), of(second), of(first + second)
    ends = 2 * sum(of(1).values()) - sum(of(2).values())  # embeddings and logits
    assert sum(both.values()) == pytest.approx(sum(one.values()) + sum(two.values()) - ends, rel=1e-9)


def test_activations_grow_with_the_micro_batch(dense: ModelSpec) -> None:
    one, two = memory(dense, Layout()), memory(dense, Layout(), micro_batch=2)
    assert two["activations"] == pytest.approx(2 * one["activations"])
    assert two["logits"] == pytest.approx(2 * one["logits"])
    assert two["weights"] == one["weights"]


def test_activations_of_a_layer_by_hand() -> None:
    # per token of a dense layer: the stream and its norm before both branches (4 * 32), queries, keys and values
    # (4 * 8 + 2 * 2 * 8), the mixed values (32), gate and up (2 * 48), their product (48); of two bytes
    kinds = {"dense": {"mixer": "local", "ffn": "mlp"}}
    spec = decode(
        ModelSpec,
        {"d_model": 32, "vocab_size": 64, "local": SLIDING, "mlp": MLP, "kinds": kinds, "layers": "dense"},
    )
    elements = 4 * 32 + 64 + 32 + 96 + 48
    assert memory(spec, Layout())["activations"] * GIB == pytest.approx(2 * elements * 4096)


@pytest.mark.parametrize("recompute", ["full", "selective_op", "selective:moe", "selective:moe_act,layernorm"])
def test_recomputing_keeps_less(sparse: ModelSpec, recompute: str) -> None:
    kept, again = memory(sparse, Layout()), memory(sparse, Layout(), recompute)
    assert again["activations"] + again["dispatch"] < kept["activations"] + kept["dispatch"]
    assert again["weights"] == kept["weights"]


def test_activations_on_the_host_leave_two_layers_on_the_device(dense: ModelSpec) -> None:
    kept = memory(dense, Layout())["activations"]
    assert memory(dense, Layout(), "offload")["activations"] == pytest.approx(kept * 2 / 32)
    assert memory(dense, Layout(), "offload:16")["activations"] == pytest.approx(kept * (16 + 2) / 32)
    inputs = memory(dense, Layout(), "full")["activations"] - memory(dense, Layout(), "full+offload")["activations"]
    assert inputs * GIB == pytest.approx(2 * 4096 * 4096 * 30)


def test_offloading_takes_time_where_the_link_is_slow(dense: ModelSpec) -> None:
    points = Points.of([Layout()] * 2, seq_len=4096, global_batch=8, recompute=["none", "offload"])
    longer = []
    for name in ("gb200_nvl72", "h100_8x"):
        kept, moved = price(dense, machine(name), points, Run(), engine_of("megatron")).seconds
        longer.append(moved / kept)
    assert 1 < longer[0] < longer[1] < 3  # 225 and 64 GB/s to the host


def test_states_on_the_host_free_the_device_and_take_time(dense: ModelSpec) -> None:
    points = Points.of([Layout(dp=8)], seq_len=4096, global_batch=8)
    here, there = (
        price(dense, machine("h100_8x"), points, Run(optimizer=name), engine_of("megatron"))
        for name in ("adamw", "adamw_host")
    )
    assert there.memory_gib["optimizer"][0] == 0 < here.memory_gib["optimizer"][0]
    assert there.seconds[0] > here.seconds[0]


def test_every_other_product_as_its_authors_count(dense: ModelSpec) -> None:
    """Kept by torchtitan's per-op policy: a layer's input, queries, values, what attention gives, one of gate and its
    partner, and what the MLP gives."""
    found = memory(dense, Layout(), "selective_op")["activations"] * GIB / (2 * 4096 * 32)
    assert found == pytest.approx(4096 + 4096 + 1024 + 4096 + 14336 + 4096, rel=0.02)


def test_the_first_stage_keeps_as_many_micro_batches_as_there_are_stages(dense: ModelSpec) -> None:
    points = Points.of([Layout(pp=4), Layout(pp=4, vp=2)], seq_len=4096, global_batch=64, micro_batch=1)
    first, last = (memory_of(dense, points, Storage(), stage=stage) for stage in ("first", "last"))
    assert first["activations"][0] == pytest.approx(4 * last["activations"][0])
    assert first["activations"][1] == pytest.approx(first["activations"][0] * (1 + 3 / 8))  # arXiv:2205.05198
    fullest = memory_of(dense, points, Storage())
    np.testing.assert_allclose(total(fullest), np.maximum(total(first), total(last)))


def test_peaks_of_megatron_s_own_tests() -> None:
    errors = [abs(predicted(test) / test.peak_gib - 1) for test in measured()]
    assert len(errors) > 150
    assert np.median(errors) < 0.10


def test_peaks_of_another_simulator_s_ground_truth() -> None:
    """43 measured runs on B200 (arXiv-less: SimuMax, b200_release_v1.2_summary.json): GiB allocated."""
    errors = []
    for run in runs():
        if run.epoch != "core_0.14":
            continue
        spec = model_of(run.model)
        assert spec is not None
        points = Points.of([run.layout], seq_len=run.seq_len, global_batch=run.global_batch, recompute=run.recompute)
        found = price(spec, machine(run.hardware), points, Run(mtp=bool(run.mtp)), engine_of("megatron@core_0.14"))
        errors.append(abs((found.total_gib[0] - found.memory_gib["workspace"][0]) / run.memory_gb - 1))
    assert len(errors) > 40
    assert np.median(errors) < 0.08


def test_data_files_name_their_sources() -> None:
    for name in ("memory_rows", "planner_rows"):
        with (Path(__file__).parents[2] / "benchmarks" / "data" / f"{name}.csv").open(encoding="utf-8") as file:
            assert all(row["source"] for row in csv.DictReader(file))
