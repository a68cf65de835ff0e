"""Volumes of communication against counts by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import zoo
from zoo.plan.layout import Layout, Points
from zoo.plan.products import sizes_of, uses_of
from zoo.plan.traffic import Traffic, traffic_of
from zoo.spec.model import ModelSpec


@pytest.fixture(scope="module")
def dense(load_model: Callable[[str], ModelSpec]) -> ModelSpec:
    return load_model("llama3_8b")


@pytest.fixture(scope="module")
def sparse(load_model: Callable[[str], ModelSpec]) -> ModelSpec:
    return load_model("qwen3_30b_a3b")


def traffic(spec: ModelSpec, layout: Layout, micro_batch: int = 1, seq_len: int = 4096) -> Traffic:
    batch = micro_batch * layout.dp
    points = Points.of([layout], seq_len=seq_len, global_batch=batch, micro_batch=micro_batch)
    return traffic_of(spec, uses_of(spec, False), points)


def test_one_device_sends_nothing(dense: ModelSpec) -> None:
    found = traffic(dense, Layout())
    assert not any(getattr(found, kind)[0] for kind in ("tp", "ep", "etp", "cp", "pp", "shard", "dp", "dp_experts"))


def test_tensor_parallelism_gathers_and_scatters_the_stream_twice_a_layer(dense: ModelSpec) -> None:
    # 32 layers, two branches, a gather and a scatter each of [4096 tokens, 4096 channels]; 3 of 4 parts are sent
    assert traffic(dense, Layout(tp=4)).tp[0] == 32 * 2 * 2 * 4096 * 4096 * 3 / 4
    assert traffic(dense, Layout(tp=4)).tp_calls[0] == 128


def test_experts_get_each_choice_and_send_it_back(sparse: ModelSpec) -> None:
    # 48 layers, 8 choices, 2048 channels, there and back; 7 of 8 go to other devices
    assert traffic(sparse, Layout(ep=8, dp=8)).ep[0] == 48 * 2 * 8 * 4096 * 2048 * 7 / 8
    assert traffic(sparse, Layout(ep=8, dp=8, tp=2)).ep[0] == 48 * 2 * 8 * 4096 / 2 * 2048 * 7 / 8
    assert traffic(sparse, Layout(ep=8, dp=16)).ep[0] == traffic(sparse, Layout(ep=8, dp=8)).ep[0]


def test_shared_experts_gather_their_tokens(sparse: ModelSpec) -> None:
    # each of two devices has half of every expert and gathers as many rows as it has itself
    assert traffic(sparse, Layout(tp=2, etp=2)).etp[0] == 48 * 2 * 8 * 4096 / 2 * 2048


def test_context_parallelism_passes_keys_and_values(dense: ModelSpec) -> None:
    # 8 groups of 128 channels, keys and values; a device holds 1024 of 4096 tokens and sends them on three times
    assert traffic(dense, Layout(cp=4)).cp[0] == 32 * 2 * 8 * 128 * 1024 * 3


def test_stages_pass_the_stream(dense: ModelSpec) -> None:
    assert traffic(dense, Layout(pp=4)).pp[0] == 4096 * 4096
    assert traffic(dense, Layout(pp=4, vp=2, tp=2)).pp[0] == 2 * 4096 * 4096 / 2


def test_replicas_reduce_every_parameter_once(dense: ModelSpec) -> None:
    norms = 65 * 4096  # the last norm is not counted: it is 4096 of 8e9
    assert traffic(dense, Layout(dp=8)).dp[0] == pytest.approx(dense.params().total * 7 / 8, rel=1e-4)
    assert dense.params().total * 7 / 8 - traffic(dense, Layout(dp=8)).dp[0] <= norms


def test_experts_are_reduced_in_their_own_group(sparse: ModelSpec) -> None:
    experts = sparse.params().by_block["moe.experts"].total
    found = traffic(sparse, Layout(ep=8, dp=32))
    assert found.dp_experts[0] == experts / 8 * 3 / 4  # four devices hold the same experts
    assert traffic(sparse, Layout(ep=8, dp=8)).dp_experts[0] == 0


def test_full_sharding_gathers_every_parameter(dense: ModelSpec) -> None:
    found = traffic(dense, Layout(dp=8, shard=8))
    assert found.shard[0] == pytest.approx(dense.params().total * 7 / 8, rel=1e-4)
    assert found.dp[0] == 0
    hybrid = traffic(dense, Layout(dp=16, shard=8))
    assert hybrid.shard[0] == found.shard[0]
    assert hybrid.dp[0] == pytest.approx(dense.params().total / 8 / 2, rel=1e-4)


def test_the_estimate_adds_up_a_step() -> None:
    layout = zoo.Layout(tp=4, dp=2)
    found = zoo.estimate("llama3_8b", "h100_8x", layout=layout, seq_len=4096, global_batch=8, recompute="none")
    once = 4096 * 4096 * 3 / 4 * 2
    ends = 2 * 2  # embedding and head, forward and backward
    # The backward pass gathers its inputs again; four micro-batches.
    assert found.traffic["tp"] == once * (32 * 2 * 2 * 2.5 + ends) * 4
    assert found.traffic["ep"] == 0


def test_torch_gathers_once_and_sums_whole_gradients_in_every_micro_batch(sparse: ModelSpec) -> None:
    layout = zoo.Layout(tp=2, dp=4, ep=4, shard=4)
    found = zoo.estimate(sparse, "h100_8x", layout=layout, seq_len=4096, global_batch=8, recompute="none")
    once, sizes = 4096 * 4096 / 2 * 2, sizes_of(sparse, False)
    layers = sparse.num_layers
    per_micro_batch = once * (layers * 2 * 2 + 2 * 2) * sparse.d_model / 4096 + 2 * 2 * sizes.whole / 2
    assert found.traffic["tp"] == pytest.approx(per_micro_batch * 2)


def test_experts_without_a_partner_are_shared_by_all_that_have_them() -> None:
    def shared(layout: zoo.Layout) -> float:
        return float(Points.of([layout], seq_len=4096, global_batch=256).expert_shard[0])

    assert shared(zoo.Layout(dp=64, ep=16, shard=32)) == 2
    assert shared(zoo.Layout(dp=64, ep=16, shard=8)) == 4  # no two of a shard group have the same experts
    assert shared(zoo.Layout(dp=64, ep=16)) == 1
