"""Bytes on one device by component, from shapes: arrays in, arrays out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zoo.plan.layout import Array, Points
from zoo.plan.products import Sizes, Use, sizes_of, uses_of
from zoo.spec.model import ModelSpec

GIB = 2.0**30
STATE_BYTES = {
    "adamw": 8.0,
    "adam": 8.0,
    "muon": 4.0,
    "sgd": 0.0,
    "sgd_momentum": 4.0,
    "adamw_bf16": 4.0,
    "adamw_8bit": 2.0,
    "adamw_host": 8.0,
}
"""Of an optimizer's moments for each parameter: in fp32, in bf16 (Megatron-Core's precision-aware optimizer), or in a
byte each (arXiv:2110.02861)."""
ON_HOST = ("adamw_host",)
"""Optimizers whose moments and master weights are kept, and updated, by the host."""
EVERY_OTHER_OF_MIXER = 0.125
"""Of a mixer's inner activations, those that recomputing every other product does without."""
ACT_OF_EXPERTS = {True: 0.4, False: 0.5}
"""Of what experts keep inside, the part that computing activations again does without, by whether there are gates."""
LAYERS_UNDER_WAY = 2.0
"""Of those whose activations go to the host: the one that is worked on and the one that is moved."""


@dataclass(frozen=True)
class Storage:
    """How many bytes an engine spends on what."""

    master: float = 4.0
    """On the weight that the optimizer updates, beside the one that is computed with; 0: they are one."""
    weight: float = 2.0
    """On a weight that is computed with."""
    gradient: float = 4.0
    moments: float = 8.0
    activation: float = 2.0
    logit: float = 8.0
    """On a logit: in its own dtype, in fp32, and its gradient, as far as they live at the same time."""
    spread_states: bool = True
    """Master weights and moments are spread over the replicas."""
    fused_attention: bool = True
    dropout: bool = False
    """One more byte for each element that leaves a branch."""
    sequence_parallel: bool = True
    """The residual stream is shared among the devices of tensor parallelism as well."""
    gathered: float = 2.0
    """Layers whose sharded weights are whole at the same time: the one that is worked on and the next."""
    whole_ends: bool = False
    """Embedding and head are whole during a pass, not only while they are worked on (torch's `fully_shard` of a model
    puts them together in its outermost group)."""
    keeps_gathered: bool = False
    """With sequence parallelism, what blocks gather of their inputs is kept, not gathered a second time."""
    states_on_host: bool = False
    """Master weights and moments take no memory of the device."""


def memory_of(
    spec: ModelSpec, p: Points, storage: Storage, *, mtp: bool = False, stage: str = "fullest"
) -> dict[str, Array]:
    """GiB by component on one device, [n] each; they sum to the peak that is allocated.

    Args:
        mtp: multi-token prediction is trained along.
        stage: `first`, `last`, or `fullest`: the components of whichever of the two needs more.
    """
    uses, sizes = uses_of(spec, mtp), sizes_of(spec, mtp)
    stages = {name: _stage(spec, uses, sizes, p, storage, name == "first") for name in ("first", "last")}
    if stage != "fullest":
        return stages[stage]
    first_wins = total(stages["first"]) >= total(stages["last"])
    return {name: np.where(first_wins, stages["first"][name], stages["last"][name]) for name in stages["first"]}


def total(parts: dict[str, Array]) -> Array:
    """The sum of all components."""
    return np.asarray(sum(parts.values(), np.zeros(1)))


def _stage(spec: ModelSpec, uses: list[Use], sizes: Sizes, p: Points, s: Storage, first: bool) -> dict[str, Array]:
    alone = p.pp == 1
    table = np.where(alone, sizes.embed + sizes.head, sizes.embed if first else max(sizes.head, sizes.embed)) / p.tp
    dense = (sizes.cut / p.tp + sizes.whole) / p.pp + table
    experts = sizes.experts / (p.ep * p.etp * p.pp)
    sharded = p.shard > 1
    kept = dense / p.shard + experts / p.expert_shard
    spread = dense / (p.dp * p.cp) + experts / np.maximum(p.expert_dp, 1.0)
    states = np.where(sharded, kept, spread if s.spread_states else dense + experts)
    whole = s.gathered * (dense + experts) / (spec.num_layers / p.pp + 1) + (table if s.whole_ends else 0.0)
    gathered = np.where(sharded, whole * s.weight, 0.0)
    in_flight = flight(p) if first else np.where(alone, 1.0, np.minimum(1.0 + (p.pp - 1) / p.pp * (p.vp > 1), p.pp))
    activations, dispatch = activation_bytes(spec, uses, p, s, in_flight)
    ends = alone | (not first)
    logits = np.where(ends, p.tokens * spec.vocab_size / p.tp * s.logit, 0.0)
    master = np.where(sharded & (s.master > 0), 0.0, s.master)  # fully sharded engines keep one weight, in fp32
    weight = np.where(sharded & (s.master > 0), s.master, s.weight)
    parts = {
        "weights": kept * weight + gathered,
        "gradients": kept * s.gradient,
        "optimizer": states * (0.0 if s.states_on_host else master + s.moments),
        "activations": activations,
        "dispatch": dispatch,
        "logits": logits,
    }
    return {name: np.asarray(value / GIB) for name, value in parts.items()}


def flight(p: Points) -> Array:
    """Micro-batches that the first stage keeps, as parts of all its layers (1F1B, interleaved: arXiv:2205.05198)."""
    most = p.pp * (1.0 + np.where(p.vp > 1, (p.pp - 1) / (p.pp * p.vp), 0.0))
    return np.asarray(np.minimum(most, np.maximum(p.num_micro_batches, 1.0)))


def activation_bytes(spec: ModelSpec, uses: list[Use], p: Points, s: Storage, in_flight: Array) -> tuple[Array, Array]:
    """Bytes that layers keep on the device, and those of them that are copies of tokens at experts [n] each."""
    kept, routed, widest = micro_batch_bytes(spec, uses, p, s)
    peak = np.where(p.again("full") > 0, 2 * widest, 0.0)
    share = p.offloaded(spec.num_layers)
    layers = in_flight * spec.num_layers / p.pp
    here = 1.0 - share + np.minimum(share, LAYERS_UNDER_WAY / layers)
    return kept * in_flight * here + peak, routed * in_flight * here


def offloaded_bytes(spec: ModelSpec, uses: list[Use], p: Points, s: Storage) -> Array:
    """Bytes of one micro-batch that a mean stage sends to its host, and fetches back [n]."""
    kept, routed, _ = micro_batch_bytes(spec, uses, p, s)
    return np.asarray((kept + routed) * p.offloaded(spec.num_layers))


def micro_batch_bytes(spec: ModelSpec, uses: list[Use], p: Points, s: Storage) -> tuple[Array, Array, Array]:
    """Bytes that the layers of a mean stage keep of one micro-batch: in all but copies of tokens at experts, in these,
    and all that the largest block has while it is worked on [n] each."""
    full, tokens = p.again("full"), p.tokens / p.tp
    stream = np.ones(len(p)) if s.sequence_parallel else p.tp
    kept, routed, widest = np.zeros(len(p)), np.zeros(len(p)), np.zeros(len(p))
    for use in uses:
        parts, times = use.cost.activations(), use.times / p.pp
        byte = _kept_elements(use, p, stream) * s.activation + (spec.d_model * stream if s.dropout else 0.0)
        if s.keeps_gathered and s.sequence_parallel and _gathers(use):
            # Routers and experts work with a device's own tokens: these are kept beside all tokens, else among them.
            byte = byte + spec.d_model * (p.tp - (0 if use.experts else 1)) * (p.tp > 1) * s.activation
        if use.is_mixer and not s.fused_attention:
            heads = getattr(use.cost.spec, "num_heads", 0)
            byte = byte + 5.0 * heads * p.seq_len * (1 - p.again("core"))
        act = ACT_OF_EXPERTS[getattr(use.cost.spec, "gated", True)] * p.again("act")
        sent = (parts["routed"] * p.etp + parts["experts"] * (1 - act)) * (1 - p.again("moe"))
        whole, moved = byte * tokens, sent * s.activation * tokens
        widest = np.maximum(widest, whole + moved)
        kept = kept + times * whole * (1 - full)
        routed = routed + times * moved * (1 - full)
    per_layer = spec.d_model * stream * s.activation * tokens * spec.num_layers / p.pp
    return np.where(full > 0, per_layer, kept), routed, widest


def _gathers(use: Use) -> bool:
    """Whether a block has matrices that tensor parallelism cuts, and so needs the tokens of all devices."""
    return any(product.split == "rows" and not product.grouped for product in use.products)


def _kept_elements(use: Use, p: Points, stream: Array) -> Array:
    """Elements that a token keeps in a block, copies at experts aside [n]."""
    parts = use.cost.activations()
    act, other = p.again("act"), p.again("every_other")
    inputs = parts["inputs"] * stream * (1 - 0.5 * np.maximum(act, other))
    if use.is_mixer:
        # Of the products with queries, keys, values and the output every other one is kept, and what attention gives:
        # all but the keys, an eighth with few of them. Of a gate and its partner it is the half.
        own = inputs + parts["inner"] * (1 - EVERY_OTHER_OF_MIXER * other) + parts["hidden"] * (1 - act)
        return np.asarray(own - p.again("up") * _from_latents(use))
    own = inputs + parts["inner"] * (1 - 0.5 * other) + parts["hidden"] * (1 - np.maximum(act, other))
    if use.experts:
        return np.asarray(own)
    entered = parts["inputs"] * stream * 0.5
    return np.asarray(entered + (own - entered) * (1 - p.again("mlp")))


def _from_latents(use: Use) -> float:
    return float(
        sum(product.n for product in use.products if product.k < use.cost.d_model and product.split == "columns")
    )
