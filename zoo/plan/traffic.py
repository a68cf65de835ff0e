"""How many bytes a device sends in a step, by kind: nothing here depends on how fast a link is.

Volumes are what one device sends (and receives), as in ring algorithms: (g - 1) / g of the data for an all-gather or a
reduce-scatter in a group of g, twice that for an all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zoo.plan.layout import Array, Points
from zoo.plan.products import Use, sizes_of
from zoo.spec.model import ModelSpec


@dataclass(frozen=True)
class Traffic:
    """Elements that one device sends [n], and how often it starts to."""

    tp: Array
    """In a forward pass of one micro-batch: gathers and scatters of the residual stream."""
    tp_calls: Array
    tp_ends: Array
    """The same at the embedding and the head."""
    tp_whole: Array
    """In a backward pass of one micro-batch: gradients of weights that all devices have whole, where nothing keeps the
    sum for the last micro-batch."""
    ep: Array
    """In a forward pass of one micro-batch: tokens to experts and back, each choice by itself."""
    ep_calls: Array
    etp: Array
    """In a forward pass of one micro-batch: what devices that share an expert gather and scatter."""
    etp_calls: Array
    cp: Array
    """In a forward pass of one micro-batch: keys and values of the other devices."""
    cp_calls: Array
    pp: Array
    """In a forward pass of one micro-batch: the residual stream to the next stage."""
    pp_calls: Array
    shard: Array
    """Weights gathered for one pass of a micro-batch; as many gradients are scattered."""
    dp: Array
    """Once a step: gradients scattered; as many weights are gathered where states alone are spread."""
    dp_experts: Array
    """The same for experts, in their own group."""
    tp_group: Array
    cp_group: Array
    ep_group: Array
    etp_group: Array
    dp_group: Array
    edp_group: Array
    shard_group: Array
    top_k: Array


def traffic_of(spec: ModelSpec, uses: Sequence[Use], p: Points) -> Traffic:
    """The traffic of a model at every one of `points`."""
    stream = p.tokens * spec.d_model
    tp = tp_calls = ep = ep_calls = etp = etp_calls = cp = cp_calls = np.zeros(len(p))
    top_k = np.ones(len(p))
    for use in uses:
        times = use.times / p.pp
        cut = [product for product in use.products if product.split == "rows" and not product.grouped]
        if cut:
            tp = tp + 2 * times * stream * _others(p.tp)
            tp_calls = tp_calls + 2 * times * (p.tp > 1)
        if use.experts:
            width = next(product.k for product in use.products if product.grouped)
            sent = 2 * times * use.top_k * p.tokens / p.tp * width
            ep = ep + sent * _others(p.ep)
            ep_calls = ep_calls + 2 * times * (p.ep > 1)
            etp = etp + sent * (p.etp - 1)
            etp_calls = etp_calls + 2 * times * (p.etp > 1)
            top_k = top_k * 0 + use.top_k
        kept = getattr(use.cost.spec, "num_kv_heads", 0)
        if use.is_mixer and "scores" in use.cost.mixing(2, True):
            cp = cp + times * p.tokens * (p.cp - 1) * _kv_width(use.cost.spec, kept) / p.tp
            cp_calls = cp_calls + times * (p.cp > 1)
    sizes = sizes_of(spec, mtp=False)
    dense = (sizes.cut / p.tp + sizes.whole) / p.pp + (sizes.embed + sizes.head) / p.tp / p.pp
    experts = sizes.experts / (p.ep * p.etp * p.pp)
    sharded = p.shard > 1
    dp_group = np.where(sharded, p.dp * p.cp / p.shard, p.dp * p.cp)
    edp_group = np.where(sharded, p.expert_dp / p.expert_shard, p.expert_dp)
    return Traffic(
        tp=tp,
        tp_calls=tp_calls,
        tp_ends=2 * stream / p.pp * _others(p.tp),
        tp_whole=2 * sizes.whole / p.pp * _others(p.tp),
        ep=ep,
        ep_calls=ep_calls,
        etp=etp,
        etp_calls=etp_calls,
        cp=cp,
        cp_calls=cp_calls,
        pp=stream / p.tp * p.vp * (p.pp > 1),
        pp_calls=p.vp * (p.pp > 1),
        shard=dense * _others(p.shard) + experts * _others(p.expert_shard),
        dp=dense / np.where(sharded, p.shard, 1) * _others(dp_group),
        dp_experts=experts / np.where(sharded, p.expert_shard, 1) * _others(edp_group),
        tp_group=p.tp,
        cp_group=p.cp,
        ep_group=p.ep,
        etp_group=p.etp,
        dp_group=dp_group,
        edp_group=edp_group,
        shard_group=p.shard,
        top_k=top_k,
    )


def _others(group: Array) -> Array:
    return (group - 1) / np.maximum(group, 1)


def _kv_width(spec: object, kv_heads: int) -> float:
    if kv_heads:
        head = getattr(spec, "head_dim", None) or 128
        return float(kv_heads * (head + (getattr(spec, "v_head_dim", None) or head)))
    heads = getattr(spec, "num_heads", 1)
    return float(heads * (getattr(spec, "qk_head_dim", 128) + getattr(spec, "v_head_dim", 128)))
