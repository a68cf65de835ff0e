"""LFM2 mixture of experts and LFM3: short convolutions with attention now and then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.hf.families.shared import (
    LAYER,
    attention_weights,
    feed_forward_weights,
    sigmoid_router,
    trunk_weights,
)
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys, refused
from zoo.hf.layers import Always, FirstDense, Layers, Listed
from zoo.hf.rope import Rope, RopeByType
from zoo.hf.rows import Const, Field, heads, trunk
from zoo.hf.weights import Fused, JointRow, Same, WeightRow
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec
from zoo.spec.short_conv import ShortConvSpec

_OURS = "layers.{n}.mixer"


def _conv_weights(spec: ShortConvSpec) -> Iterator[WeightRow | JointRow]:
    theirs = f"{LAYER}.conv"
    for kind in ("weight", "bias"):
        yield Fused(tuple(f"{_OURS}.{part}.{kind}" for part in "bcv"), f"{theirs}.in_proj.{kind}")
        yield Same(f"{_OURS}.conv.{kind}", (f"{theirs}.conv.{kind}",))
        yield Same(f"{_OURS}.out.{kind}", (f"{theirs}.out_proj.{kind}",))


def _lfm_weights() -> Iterator[WeightRow]:
    yield from trunk_weights()
    yield Same("norm.weight", ("model.embedding_norm.weight",))
    names = {"mixer_norm": "operator_norm", "ffn_norm": "ffn_norm"}
    for ours, theirs in {**names, "mixer_post_norm": "post_operator_norm", "ffn_post_norm": "post_ffn_norm"}.items():
        yield Same(f"layers.{{n}}.{ours}.weight", (f"{LAYER}.{theirs}.weight",))
    yield from attention_weights()
    yield from feed_forward_weights({"gate": "w1", "up": "w3", "down": "w2"}, "gate")


_LFM_DEFAULTS: dict[str, Any] = {
    "conv_bias": False,
    "initializer_range": 0.02,
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def _no_rule(keys: Keys, num_layers: int) -> list[str]:
    raise refused("layer_types", None, f"must be a list of {num_layers} names, one for each layer")


class LayerTypes(Listed):
    """`layer_types`, which must be given."""

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        if keys.take(self.key, None) is None:
            return self.rule(keys, num_layers)
        return Listed(self.key, self.slots, lambda keys, num_layers: []).read(keys, num_layers)


LFM2_MOE = Family(
    model_type="lfm2_moe",
    architecture="Lfm2MoeForCausalLM",
    slots={
        "attention": Slot(AttentionSpec),
        "conv": Slot(ShortConvSpec, weights=_conv_weights),
        "mlp": Slot(MLPSpec),
        "moe": Slot(MoESpec),
    },
    layers=Layers(
        LayerTypes("layer_types", {"conv": "conv", "full_attention": "attention"}, _no_rule),
        FirstDense("num_dense_layers", listed=None),
        {
            "conv_dense": ("conv", "mlp"),
            "conv": ("conv", "moe"),
            "attention_dense": ("attention", "mlp"),
            "attention": ("attention", "moe"),
        },
    ),
    rows=(
        *trunk("norm_eps"),
        Field("head.tied", "tie_word_embeddings tie_embedding"),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Const("attention.qk_norm", "head"),
        Rope(),
        Field("conv.width", "conv_L_cache"),
        Field("conv.bias", "conv_bias"),
        Field("mlp.d_ffn", "intermediate_size"),
        Field("moe.num_experts", "num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "moe_intermediate_size"),
        *sigmoid_router(),
        Const("moe.router.arithmetic", "model"),
        Field("moe.router.correction_bias", "use_expert_bias"),
        Field("moe.router.normalize", "norm_topk_prob"),
        Const("moe.router.normalize_eps", 1e-6),
    ),
    weights=(
        *_lfm_weights(),
        Same("layers.{n}.ffn.router.correction_bias", (f"{LAYER}.feed_forward.expert_bias",)),
        *(
            Same(f"{_OURS}.{ours}.{kind}", (f"{LAYER}.self_attn.{theirs}.{kind}",))
            for ours, theirs in {"q_norm": "q_layernorm", "k_norm": "k_layernorm", "out": "out_proj"}.items()
            for kind in ("weight", "bias")
        ),
    ),
    defaults={
        **_LFM_DEFAULTS,
        "conv_L_cache": 3,
        "head_dim": None,
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "norm_topk_prob": True,
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "rope_theta": 1_000_000.0,
        "routed_scaling_factor": 1.0,
        "use_expert_bias": True,
    },
)


def _conv_between(keys: Keys, num_layers: int) -> list[str]:
    """Every second layer is a convolution; the others are full and sliding in turns, but for the first."""
    by_place = {2: "attention", 0: "local"}
    return [by_place.get(layer % 4, "conv") if layer else "conv" for layer in range(num_layers)]


_BY_TYPE = {"full_attention": "attention", "sliding_attention": "local"}

LFM3 = Family(
    model_type="lfm3",
    architecture="Lfm3ForCausalLM",
    slots={
        "attention": Slot(AttentionSpec, {"mask": "causal"}),
        "local": Slot(AttentionSpec, {"mask": "sliding"}, like="attention"),
        "conv": Slot(ShortConvSpec, weights=_conv_weights),
        "mlp": Slot(MLPSpec),
    },
    layers=Layers(
        Listed("layer_types", {"conv": "conv", **_BY_TYPE}, _conv_between),
        Always("mlp"),
        {"conv": ("conv", "mlp"), "full": ("attention", "mlp"), "local": ("local", "mlp")},
    ),
    rows=(
        *trunk("norm_eps"),
        Field("norm_placement", "use_sandwich_norm", {True: "sandwich", False: "pre"}),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Const("attention.qk_norm", "head"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        Field("attention.gate", "use_attention_gate", {True: "head", False: "none"}),
        RopeByType(_BY_TYPE),
        Const("local.mask", "sliding"),
        Field("local.window", "sliding_window"),
        Field("conv.width", "conv_L_cache"),
        Field("conv.bias", "conv_bias"),
        Field("mlp.d_ffn", "intermediate_size"),
    ),
    weights=(
        *_lfm_weights(),
        Same(f"{_OURS}.gate.weight", (f"{LAYER}.self_attn.gate_proj.weight", f"{LAYER}.self_attn.g_proj.weight")),
    ),
    defaults={
        **_LFM_DEFAULTS,
        "attention_bias": False,
        "conv_L_cache": 7,
        "head_dim": 128,
        "num_key_value_heads": 4,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1_000_000.0,
                "partial_rotary_factor": 0.5,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "sliding_window": 256,
        "use_attention_gate": True,
        "use_sandwich_norm": True,
    },
)
