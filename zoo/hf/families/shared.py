"""What families have in common: rows of config tables are in `zoo.hf.rows`, these are names of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from zoo.hf.rows import Const, Field, Row
from zoo.hf.weights import Experts, Fused, JointRow, Same, WeightRow

LAYER = "model.layers.{n}"


def trunk_weights() -> Iterator[WeightRow]:
    """Embedding, head and the norms of a layer with norms before its two blocks."""
    yield Same("embed.weight", ("model.embed_tokens.weight",))
    yield Same("norm.weight", ("model.norm.weight",))
    yield Same("head.weight", ("lm_head.weight",))
    yield Same("layers.{n}.mixer_norm.weight", (f"{LAYER}.input_layernorm.weight",))
    yield Same("layers.{n}.ffn_norm.weight", (f"{LAYER}.post_attention_layernorm.weight",))


def attention_weights() -> Iterator[WeightRow]:
    """Separate projections, with their biases and norms."""
    for ours, theirs in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}.items():
        for kind in ("weight", "bias"):
            yield Same(f"layers.{{n}}.mixer.{ours}.{kind}", (f"{LAYER}.self_attn.{theirs}.{kind}",))
    for norm in ("q_norm", "k_norm"):
        yield Same(f"layers.{{n}}.mixer.{norm}.weight", (f"{LAYER}.self_attn.{norm}.weight",))


def mlp_weights() -> Iterator[WeightRow]:
    """A gated MLP."""
    for part in ("gate", "up", "down"):
        for kind in ("weight", "bias"):
            yield Same(f"layers.{{n}}.ffn.{part}.{kind}", (f"{LAYER}.mlp.{part}_proj.{kind}",))


def moe_weights() -> Iterator[WeightRow]:
    """A router and gated experts, stored apart on the hub and stacked in the memory of transformers 5."""
    experts = f"{LAYER}.mlp.experts"
    each = f"{experts}.{{e}}"
    yield Same("layers.{n}.ffn.router.weight", (f"{LAYER}.mlp.gate.weight",))
    yield Experts(
        "layers.{n}.ffn.experts.gate_up",
        (f"{each}.gate_proj.weight", f"{each}.up_proj.weight"),
        f"{experts}.gate_up_proj",
    )
    yield Experts("layers.{n}.ffn.experts.down", (f"{each}.down_proj.weight",), f"{experts}.down_proj")


def norm_weights(names: Mapping[str, str], biased: bool = False) -> Iterator[WeightRow]:
    """Norms of a layer, by our name to theirs."""
    for ours, theirs in names.items():
        for kind in ("weight", "bias") if biased else ("weight",):
            yield Same(f"layers.{{n}}.{ours}.{kind}", (f"{LAYER}.{theirs}.{kind}",))


def ends_weights(biased: bool = False) -> Iterator[WeightRow]:
    """Embedding, last norm and head."""
    yield Same("embed.weight", ("model.embed_tokens.weight",))
    yield Same("head.weight", ("lm_head.weight",))
    for kind in ("weight", "bias") if biased else ("weight",):
        yield Same(f"norm.{kind}", (f"model.norm.{kind}",))


SANDWICH = {
    "mixer_norm": "input_layernorm",
    "mixer_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
"""Norms before and after both blocks."""


def fused_mlp_weights() -> Iterator[WeightRow | JointRow]:
    """A gated MLP whose gate and up matrices are one."""
    yield Fused(("layers.{n}.ffn.gate.weight", "layers.{n}.ffn.up.weight"), f"{LAYER}.mlp.gate_up_proj.weight")
    yield Same("layers.{n}.ffn.down.weight", (f"{LAYER}.mlp.down_proj.weight",))


def correction_bias(*names: str) -> WeightRow:
    """The correction bias of a router."""
    return Same("layers.{n}.ffn.router.correction_bias", tuple(f"{LAYER}.mlp.{name}" for name in names))


def shared_expert_weights(name: str = "shared_experts") -> Iterator[WeightRow]:
    """The shared experts as one MLP."""
    for part in ("gate", "up", "down"):
        yield Same(f"layers.{{n}}.ffn.shared.{part}.weight", (f"{LAYER}.mlp.{name}.{part}_proj.weight",))


def sigmoid_router(
    scale: str | None = "routed_scaling_factor", slot: str = "moe", arithmetic: str = "fp32"
) -> Iterator[Row]:
    """Sigmoid scores with a correction bias."""
    yield Const(f"{slot}.router.type", "top_k")
    yield Const(f"{slot}.router.score", "sigmoid")
    yield Const(f"{slot}.router.correction_bias", True)
    yield Const(f"{slot}.router.arithmetic", arithmetic)
    if scale is not None:
        yield Field(f"{slot}.router.route_scale", scale)


def router_groups(slot: str = "moe") -> Iterator[Row]:
    """Groups of experts, of which some are open to a token."""
    yield Field(f"{slot}.router.num_groups", "n_group")
    yield Field(f"{slot}.router.top_groups", "topk_group")
    yield Field(f"{slot}.router.normalize", "norm_topk_prob")


def block_sparse_moe_weights(router: str = "gate") -> Iterator[WeightRow]:
    """Experts of three numbered matrices, stored apart on the hub and stacked in the memory of transformers 5."""
    hub, stacked = f"{LAYER}.block_sparse_moe", f"{LAYER}.mlp"
    each = f"{hub}.experts.{{e}}"
    yield Same("layers.{n}.ffn.router.weight", (f"{hub}.gate.weight", f"{stacked}.{router}.weight"))
    yield Experts(
        "layers.{n}.ffn.experts.gate_up", (f"{each}.w1.weight", f"{each}.w3.weight"), f"{stacked}.experts.gate_up_proj"
    )
    yield Experts("layers.{n}.ffn.experts.down", (f"{each}.w2.weight",), f"{stacked}.experts.down_proj")


def feed_forward_weights(parts: Mapping[str, str], router: str) -> Iterator[WeightRow]:
    """MLP and experts under one name, by the names of their matrices."""
    ffn = f"{LAYER}.feed_forward"
    for ours, theirs in parts.items():
        yield Same(f"layers.{{n}}.ffn.{ours}.weight", (f"{ffn}.{theirs}.weight",))
    gate, up, down = (f"{ffn}.experts.{{e}}.{parts[part]}.weight" for part in ("gate", "up", "down"))
    yield Experts("layers.{n}.ffn.experts.gate_up", (gate, up), f"{ffn}.experts.gate_up_proj")
    yield Experts("layers.{n}.ffn.experts.down", (down,), f"{ffn}.experts.down_proj")
    yield Same("layers.{n}.ffn.router.weight", (f"{ffn}.{router}.weight",))
