"""The time of a step, from work, facts and constants: arrays in, arrays out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zoo.plan.collectives import Links, exchange_seconds, ring_seconds
from zoo.plan.engine import Constants, Facts, Habits
from zoo.plan.kernels import BACKWARD_SCORES, attention_seconds, beyond, product_seconds, smooth_max
from zoo.plan.layout import Array, Points
from zoo.plan.work import Work

UPDATE_BYTES = 30.0
"""Read and written for each optimized parameter: gradient, master weight, two moments, the new weight."""
SCORE_BYTES = 17.0
"""Moved for each pair of a query and a key where attention is not fused: scores, mask, softmax, dropout."""
LOGIT_BYTES = 14.0
"""Moved for each logit by the cross-entropy, forward and backward."""
USUAL = Habits()


@dataclass(frozen=True)
class Step:
    """Seconds of a step on the fullest device by part, [n] each; they sum to `total`."""

    parts: dict[str, Array]

    @property
    def total(self) -> Array:
        return np.asarray(sum(self.parts.values(), np.zeros(1)))


def step_of(work: Work, p: Points, facts: Facts, c: Constants, habits: Habits = USUAL) -> Step:
    """Price work."""
    links = facts.links(c)
    micro = compute_seconds(work, facts, c, habits)
    head = micro.pop("head")
    moved = micro_traffic(work, p, facts, c, habits)
    stage = {name: value * work.layers for name, value in micro.items()}
    host = stage.pop("host")
    device = sum(stage.values(), np.zeros(1))
    waits = np.where(habits.blocking, host, smooth_max(device, host, 2.0) - device)
    waits = waits + c.micro_s * np.where(p.pp > 1, p.vp, 1.0)
    adding = c.accumulate * work.held / (0.8 * facts.byte_s)
    layers = device + waits + adding + sum(moved.values(), np.zeros(1))
    shard = beyond(shard_seconds(work, p, links), c.dp_window * (layers + head / p.pp))
    times = work.micro_batches
    parts = {name: value * times for name, value in (*stage.items(), *moved.items())}
    parts["host"] = waits * times
    parts["accumulate"] = adding * times
    parts["shard"] = shard * times
    last = np.maximum(head + layers * (work.last_layers / work.layers - 1.0), 0.0)  # all stages wait for the slowest
    parts["head"] = last * times
    stage_s = layers + shard + last
    filling = p.pp * (layers / work.layers + shard) + head - stage_s  # the first micro-batch on the other stages
    parts["bubble"] = c.bubble * np.where(p.pp > 1, filling, 0.0) / p.vp
    parts["dp"] = beyond(dp_seconds(work, p, links, habits.grad_bytes), c.dp_window * stage_s * np.minimum(times, 1.0))
    parts["optimizer"] = UPDATE_BYTES * work.shard_weights / (0.8 * facts.byte_s)
    parts["fixed"] = c.step_s * np.ones(len(p))
    domains = np.maximum(p.num_devices / facts.domain, 1.0)
    parts["jitter"] = c.jitter * np.log2(domains) * sum(parts.values(), np.zeros(1))
    return Step(parts)


def compute_seconds(work: Work, facts: Facts, c: Constants, habits: Habits) -> dict[str, Array]:
    """Seconds of one micro-batch on the mean stage, forward and backward, by part; the head's are of the whole head."""
    pace, byte_s = c.pace * facts.power**c.sustain, 0.8 * facts.byte_s * c.pace
    level = np.asarray(habits.graphs)
    moe = np.any((work.stack > 0) & (work.times > 0), axis=0)
    pace_moe = np.where(moe, c.pace_moe * np.where(level == 2, c.pace_full, 1.0), 1.0)
    left = np.where(level == 2, c.launch_full, np.where(level == 1, c.launch_partial, 1.0))
    launched = work.kernels * (3.0 + work.kernels_again) * left / c.pace / pace_moe
    each = weight_seconds(work, facts, c, pace, byte_s)
    unfused = np.where(habits.fused_attention, 0.0, work.scores * SCORE_BYTES * 2 / byte_s)
    flop_s = facts.wide * facts.reach_wide * c.dense * pace
    head = product_seconds(work.head_m, work.head_n, work.head_k, np.zeros(1), flop_s, byte_s)
    logits = LOGIT_BYTES * work.head_m * work.head_n / byte_s
    return {
        "experts": np.sum(np.where(work.stack > 0, each, 0.0), axis=0) / pace_moe,
        "matmuls": np.sum(np.where(work.stack > 0, 0.0, each), axis=0) / pace_moe,
        "mixing": np.sum(mixing_seconds(work, facts, c, pace), axis=0) + unfused,
        "memory": moved_bytes(work, facts, c, habits) / byte_s / pace_moe,
        "host": launched * (c.launch_s + np.where(habits.blocking, c.wake_s, 0.0)),
        "head": (3.0 * head + logits) * work.head_times,
    }


def weight_seconds(work: Work, facts: Facts, c: Constants, pace: Array, byte_s: Array) -> Array:
    """Seconds of every product with a weight, forward and backward [operations, n]."""
    grouped, bits = work.stack > 0, facts.bits
    speed = np.where(bits >= 16, c.dense, np.where(bits == 8, c.dense_fp8, c.dense_fp4)) * pace
    factor = np.where(grouped, c.grouped * np.where(bits < 16, c.grouped_narrow, 1.0), 1.0)
    flop_s = facts.peak * facts.reach * speed * factor
    once = product_seconds(work.m, work.n, work.k, work.stack, flop_s, byte_s, bits / 8)
    return np.asarray(once * work.times * (3.0 + work.again) * np.where(grouped, work.routed_imbalance, 1.0))


def mixing_seconds(work: Work, facts: Facts, c: Constants, pace: Array) -> Array:
    """Seconds of products of activations with each other, forward and backward [operations, n]."""
    reach = facts.reach_attention * c.attention * pace
    fast = attention_seconds(work.mix_flops, work.mix_keys, work.mix_width, facts.wide, reach)
    slow = work.mix_flops / (facts.wide * c.recurrence * pace)
    attention = fast * (1.0 + BACKWARD_SCORES + work.mix_again)
    return np.asarray(np.where(work.mix_keys > 0, attention, slow * (3.0 + work.mix_again)))


def moved_bytes(work: Work, facts: Facts, c: Constants, habits: Habits) -> Array:
    """Bytes that everything but products reads and writes, forward and backward [n]."""
    touched = c.touches * 2.0 * (3.0 * work.elements + work.elements_again)
    repeated = c.touches * 2.0 * (3.0 * work.repeated + work.repeated_again)
    touched = touched + np.where(habits.sequence_parallel, 0.0, repeated)
    touched = touched + c.touches_routed * 2.0 * (3.0 * work.routed + work.routed_again)
    cast = c.casts * work.cast + c.casts_routed * work.cast_routed
    return np.asarray(touched + np.where(facts.bits < 16, cast, 0.0))


def micro_traffic(work: Work, p: Points, facts: Facts, c: Constants, habits: Habits) -> dict[str, Array]:
    """Exposed seconds of what one micro-batch sends, by kind."""
    whole = np.asarray(habits.graphs) == 2
    t, full, links, exchange = work.traffic, p.again("full"), facts.links(c), facts.exchange_links(c)
    experts_again = np.maximum(full, p.again("moe"))
    one = np.ones(len(p))
    # Inputs that are shared are gathered again for the gradients of weights.
    passes = np.where(habits.sequence_parallel, 2.5, 2.0) + full
    tp = ring_seconds(2 * t.tp * passes, t.tp_calls * passes, t.tp_group, one, links)
    ep = exchange_seconds(
        2 * t.ep * (2 + experts_again), t.ep_calls * (2 + experts_again), t.ep_group, p.etp, t.top_k, exchange
    )
    ep = ep + ring_seconds(2 * t.etp * (2 + experts_again), t.etp_calls * (2 + experts_again), t.etp_group, one, links)
    cp = ring_seconds(2 * t.cp * (3 + full), t.cp_calls * (3 + full), t.cp_group, p.tp, links)
    pp = ring_seconds(4 * t.pp, 2 * t.pp_calls, p.pp, p.tp * p.cp * p.dp, links)
    return {
        "tp": c.tp_exposed * tp,
        "ep": c.ep_exposed * np.where(whole, c.ep_full, 1.0) * ep,
        "cp": c.cp_exposed * cp,
        "pp": c.pp_exposed * pp,
    }


def shard_seconds(work: Work, p: Points, links: Links) -> Array:
    """Seconds in which one micro-batch gathers sharded weights twice and scatters their gradients, hidden or not."""
    calls = 3.0 * 2 * work.kernels / 20.0
    return ring_seconds(2 * 3 * work.traffic.shard, calls, work.traffic.shard_group, p.tp, links)


def dp_seconds(work: Work, p: Points, links: Links, grad_bytes: Array | float) -> Array:
    """Seconds in which a step scatters gradients and gathers weights among replicas, hidden or not."""
    t = work.traffic
    each = grad_bytes + 2.0
    stride = p.tp * np.where(p.shard > 1, p.shard, 1.0)
    dense = ring_seconds(each * t.dp, np.ones(1), t.dp_group, stride, links)
    return dense + ring_seconds(each * t.dp_experts, np.ones(1), t.edp_group, p.ep * p.etp * p.expert_shard, links)
