"""What one micro-batch asks of one device, in shapes and counts: nothing here depends on how fast a machine is.

Arrays have the shape [operations, n] for n layouts, or [n].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zoo.plan.layout import Array, Points
from zoo.plan.products import Product, Use, uses_of, weights_on
from zoo.plan.traffic import Traffic, traffic_of
from zoo.spec.model import ModelSpec

ROUTED = 2.0
"""How much more often a token on its way to an expert and back is moved than one that stays: sorted, and gathered."""
KERNELS = {"mixer": 14.0, "ffn": 8.0, "moe": 42.0}
"""Kernels that a host launches for a block in a forward pass, give or take; the host's time for each is fitted."""


@dataclass(frozen=True)
class Work:
    """Matrix products and the rest of one micro-batch on one device of an average stage."""

    m: Array
    n: Array
    k: Array
    stack: Array
    """Matrices of a grouped product on this device; 0: a plain product. m counts the rows of all of them together."""
    times: Array
    """Forward passes of a micro-batch through it."""
    again: Array
    """The part of them that is computed again in the backward pass."""
    mix_flops: Array
    """Forward FLOPs of products of activations with each other."""
    mix_keys: Array
    """Keys that a query sees, twice the mean; 0: not attention but a recurrence in chunks."""
    mix_width: Array
    """Channels of a head."""
    mix_again: Array
    elements: Array
    """Activations that norms, rotations, nonlinearities and permutations read or write once, in a forward pass [n]."""
    elements_again: Array
    repeated: Array
    """More of the same where devices of tensor parallelism do not share the residual stream: each has all of it [n]."""
    repeated_again: Array
    routed: Array
    """The same of tokens on their way through experts [n]."""
    routed_again: Array
    cast: Array
    """Inputs and gradients of outputs of matrix products, which are cast to a narrow dtype first [n]."""
    cast_routed: Array
    """The same of experts [n]."""
    kernels: Array
    """Launched in a forward pass [n]."""
    kernels_again: Array
    """The part of them that is launched again in the backward pass [n]."""
    scores: Array
    """Pairs of a query and a key over all heads, masked ones included: what attention without fusion writes [n]."""
    head_m: Array
    head_n: Array
    head_k: Array
    head_times: Array
    weights: Array
    """Trained parameters on a device, had it none of them sharded [n]."""
    held: Array
    """Those that it accumulates the gradients of [n]."""
    shard_weights: Array
    """Those that it keeps the optimizer's states of [n]."""
    layers: Array
    """On the fullest stage, over those of the mean stage [n]."""
    last_layers: Array
    """The same of the last stage, which has the head beside them."""
    micro_batches: Array
    tokens: Array
    """Of a step, on one device [n]."""
    routed_imbalance: Array
    """Rows of the busiest experts' device over the mean [n]."""
    traffic: Traffic


def work_of(spec: ModelSpec, points: Points, *, mtp: bool = False, balanced: bool = True) -> Work:
    """The work of a model at every one of `points`.

    Args:
        mtp: multi-token prediction is trained along.
        balanced: every expert gets as many tokens as any other; False: as a learned router sends them.
    """
    uses, p = uses_of(spec, mtp), points
    depth = spec.mtp.depth if mtp and spec.mtp is not None else 0
    per_stage = 1.0 / p.pp
    gemms = _gemms(spec, uses, p, depth)
    one = np.ones(len(p))
    head = 1.0 + depth
    weights, held, shards = weights_on(spec, p, mtp)
    fullest, last = layers_of_stages(spec.num_layers, p.pp)
    vocab = float(spec.vocab_size)
    return Work(
        **gemms,
        **_mixing(uses, p),
        **_elements(uses, p),
        kernels=sum((use.times * _kernels(use) for use in uses), 0.0) * per_stage,
        kernels_again=p.again("full"),
        scores=_score_pairs(uses, p),
        head_m=p.tokens,
        head_n=vocab / p.tp,
        head_k=spec.d_model * one,
        head_times=head * one,
        weights=weights,
        held=held,
        shard_weights=shards,
        layers=fullest / (spec.num_layers / p.pp),
        last_layers=last / (spec.num_layers / p.pp),
        micro_batches=p.num_micro_batches,
        tokens=p.global_batch * p.seq_len / p.num_devices,
        routed_imbalance=one if balanced else imbalance(p.ep),
        traffic=traffic_of(spec, uses, p),
    )


def layers_of_stages(num_layers: int, pp: Array) -> tuple[Array, Array]:
    """Layers of the fullest stage and of the last one, which lacks half of those that are missing in full stages."""
    fullest = np.ceil(num_layers / pp - 1e-9)
    return fullest, np.maximum(fullest - np.ceil((fullest * pp - num_layers) / 2), 0.0)


def imbalance(ep: Array) -> Array:
    """Slow-down of the busiest of `ep` devices under a learned router (measured: throughput_notes.md, section 3.3)."""
    doublings = np.log2(ep)
    return np.asarray(1.05 + 0.015 * doublings + 0.026 * doublings**2)


def rows_of_experts(use: Use, p: Points) -> Array:
    """Rows that all experts of a device work on in one micro-batch and layer."""
    return use.top_k * p.tokens * p.etp / p.tp


def _gemms(spec: ModelSpec, uses: list[Use], p: Points, depth: int) -> dict[str, Array]:
    rows: list[tuple[Array, ...]] = []
    one, full = np.ones(len(p)), p.again("full")
    for use in uses:
        times = use.times / p.pp
        for index, product in enumerate(use.products):
            if product.grouped:
                m, stack = rows_of_experts(use, p), product.stack / p.ep
                cut = p.etp
            else:
                m, stack, cut = p.tokens, 0 * one, p.tp
            wide, deep = product.split == "columns", product.split == "rows"
            if product.split == "none":
                m, cut = m / p.tp, one
            again = np.maximum(full, _part_again(use, product, p))
            again = np.maximum(again, p.again("every_other") * (index % 2))
            n = product.n / cut if wide else product.n * one
            k = product.k / cut if deep else product.k * one
            rows.append((m, n, k, stack, times, again))
    if depth:
        width = float(spec.d_model)
        rows.append((p.tokens / p.tp, width * one, 2 * width * one, 0 * one, depth / p.pp, full))
    names = ("m", "n", "k", "stack", "times", "again")
    return {name: np.stack([row[index] for row in rows]) for index, name in enumerate(names)}


def _part_again(use: Use, product: Product, p: Points) -> Array:
    if use.experts:
        shared = product.name.startswith("shared")
        return p.again("moe") * (0.0 if shared else 1.0)
    if use.is_mixer:
        latent = product.k < use.cost.d_model and product.split == "columns"
        return p.again("up") * (1.0 if latent else 0.0)
    return p.again("mlp")


def _mixing(uses: list[Use], p: Points) -> dict[str, Array]:
    rows: list[tuple[Array, ...]] = []
    for use in uses:
        lengths, back = np.unique(p.seq_len, return_inverse=True)
        for part in use.cost.mixing(int(lengths[0]), True):
            per_token = np.array([use.cost.flops(int(length)).get(part, 0.0) for length in lengths])[back]
            flops = per_token * p.tokens / p.tp * use.times / p.pp
            spec = use.cost.spec
            heads, width = getattr(spec, "num_heads", 1), 0.0
            keys = np.zeros(len(p))
            if part == "scores":
                width = _head_width(spec)
                keys = per_token / (2 * heads * width)
            again = np.maximum(p.again("full"), p.again("core"))
            rows.append((flops, keys, width * np.ones(len(p)), again))
    if not rows:
        rows.append((np.zeros(len(p)),) * 4)
    names = ("mix_flops", "mix_keys", "mix_width", "mix_again")
    return {name: np.stack([row[index] for row in rows]) for index, name in enumerate(names)}


def _head_width(spec: object) -> float:
    query = getattr(spec, "qk_head_dim", None) or getattr(spec, "head_dim", None) or 128
    value = getattr(spec, "v_head_dim", None) or query
    return (query + value) / 2


def _score_pairs(uses: list[Use], p: Points) -> Array:
    total = np.zeros(len(p))
    for use in uses:
        if use.is_mixer and "scores" in use.cost.mixing(2, True):
            heads = getattr(use.cost.spec, "num_heads", 1)
            total = total + heads * p.tokens * p.seq_len / p.tp * use.times / p.pp
    return total


def _elements(uses: list[Use], p: Points) -> dict[str, Array]:
    found = {name: np.zeros(len(p)) for name in ("elements", "elements_again", "routed", "routed_again")}
    found |= {name: np.zeros(len(p)) for name in ("repeated", "repeated_again", "cast", "cast_routed")}
    for use in uses:
        kept = use.cost.activations()
        scale = use.times / p.pp * p.tokens / p.tp
        part = p.again("moe") if use.experts else 0.0 if use.is_mixer else p.again("mlp")
        again = np.maximum(np.maximum(p.again("full"), part), 0.5 * p.again("act"))
        each = {"elements": (kept["inputs"] + kept["inner"] + kept["hidden"]) * scale}
        each["repeated"] = kept["inputs"] * (p.tp - 1) * scale
        each["routed"] = (ROUTED * kept["routed"] * p.etp + kept["experts"]) * scale
        for name, value in each.items():
            found[name] = found[name] + value
            found[f"{name}_again"] = found[f"{name}_again"] + value * again
        for product in use.products:
            name = "cast_routed" if product.grouped else "cast"
            found[name] = found[name] + (product.k + product.n) * product.top_k * scale
    return found


def _kernels(use: Use) -> float:
    return KERNELS["mixer" if use.is_mixer else "moe" if use.experts else "ffn"]
