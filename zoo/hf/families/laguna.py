"""Laguna and Mellum 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoo.hf.families.shared import (
    LAYER,
    attention_weights,
    correction_bias,
    mlp_weights,
    moe_weights,
    sigmoid_router,
    trunk_weights,
)
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys, refused
from zoo.hf.layers import FirstDense, Layers, Listed, all_full
from zoo.hf.rope import RopeByType
from zoo.hf.rows import ACTIVATIONS, Const, Field, Only, SharedWidth, Tree, heads, swiglu, trunk
from zoo.hf.weights import Same
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

_SLOTS = {
    "attention": Slot(AttentionSpec, {"mask": "causal"}),
    "local": Slot(AttentionSpec, {"mask": "sliding"}, like="attention"),
    "mlp": Slot(MLPSpec),
    "moe": Slot(MoESpec),
}
_KINDS = {
    "dense": ("attention", "mlp"),
    "sparse": ("attention", "moe"),
    "local_dense": ("local", "mlp"),
    "local_sparse": ("local", "moe"),
}
_TYPES = {"full_attention": "attention", "sliding_attention": "local"}
_THETAS = {
    "full_attention": {"rope_type": "default", "rope_theta": 500_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
_DEFAULTS = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131_072,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
_BY_LAYER = "num_attention_heads_per_layer"


@dataclass(frozen=True)
class _HeadsByType:
    """Layers with windows may have another number of heads: a list says the number of each layer."""

    def read(self, keys: Keys, model: Tree) -> None:
        counts, types = keys.take(_BY_LAYER, None), keys.take("layer_types", None)
        number = keys.take("num_attention_heads")
        if counts is None:
            return
        types = types or ["full_attention"] * len(counts)
        if not isinstance(counts, list) or len(counts) != len(types):
            raise refused(_BY_LAYER, counts, "must be a list of numbers, one for each layer")
        for layer_type, slot in _TYPES.items():
            found = {count for count, other in zip(counts, types, strict=True) if other == layer_type} or {number}
            if len(found) > 1:
                raise refused(_BY_LAYER, counts, f"must be the same in all {layer_type} layers")
            model.set(f"{slot}.num_heads", found.pop())

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        config[_BY_LAYER] = {slot: model.get(f"{slot}.num_heads") for slot in _TYPES.values()}


class _Mixers(Listed):
    """`layer_types`, and the list of head counts that goes with it."""

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        super().write(chosen, config)
        config[_BY_LAYER] = [config[_BY_LAYER][slot] for slot in chosen]


LAGUNA = Family(
    model_type="laguna",
    architecture="LagunaForCausalLM",
    slots=_SLOTS,
    layers=Layers(_Mixers("layer_types", _TYPES, all_full), FirstDense(write_list=True), _KINDS),
    rows=(
        *trunk(),
        *heads(),
        _HeadsByType(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Const("attention.qk_norm", "head"),
        Field("attention.gate", "gating", {True: "head", "per-head": "head", "per-element": "element"}),
        Const("attention.gate_activation", "softplus"),
        Const("local.mask", "sliding"),
        Field("local.window", "sliding_window"),
        RopeByType(_TYPES, fraction=True),
        *swiglu(),
        Field("moe.num_experts", "num_experts num_local_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "moe_intermediate_size"),
        SharedWidth("moe", "shared_expert_intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        *sigmoid_router("moe_routed_scaling_factor", arithmetic="mixed"),
        Const("moe.router.count_bias", True),
        Field("moe.balance.aux_loss", "router_aux_loss_coef"),
        Only("moe_apply_router_weight_on_input", False),
        Only("moe_router_logit_softcapping", 0.0),
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        Same("layers.{n}.mixer.gate.weight", (f"{LAYER}.self_attn.g_proj.weight",)),
        *mlp_weights(),
        *moe_weights(),
        correction_bias("experts.e_score_correction_bias", "gate.e_score_correction_bias"),
        *(
            Same(
                f"layers.{{n}}.ffn.shared.{part}.weight",
                tuple(f"{LAYER}.mlp.{name}.{part}_proj.weight" for name in ("shared_expert", "shared_experts")),
            )
            for part in ("gate", "up", "down")
        ),
    ),
    defaults={
        **_DEFAULTS,
        "first_k_dense_replace": 1,
        "gating": True,
        "intermediate_size": 8192,
        "moe_intermediate_size": 512,
        "moe_routed_scaling_factor": 1.0,
        "num_experts": 256,
        "num_key_value_heads": 8,
        "rope_parameters": {
            "full_attention": {**_THETAS["full_attention"], "partial_rotary_factor": 0.5},
            "sliding_attention": {**_THETAS["sliding_attention"], "partial_rotary_factor": 1.0},
        },
        "shared_expert_intermediate_size": 512,
        "sliding_window": 512,
    },
)

MELLUM = Family(
    model_type="mellum",
    architecture="MellumForCausalLM",
    slots=_SLOTS,
    layers=Layers(Listed("layer_types", _TYPES, all_full), FirstDense(write_list=True), _KINDS),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        Const("attention.qk_norm", "head"),
        Const("local.mask", "sliding"),
        Field("local.window", "sliding_window"),
        RopeByType(_TYPES),
        *swiglu(),
        Field("moe.num_experts", "num_local_experts num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "moe_intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        Const("moe.router.type", "top_k"),
        Field("moe.router.normalize", "norm_topk_prob"),
        Field("moe.balance.aux_loss", "router_aux_loss_coef"),
        *(Only(key, None) for key in ("mtp_layer_types", "mtp_mlp_layer_types")),
        Only("num_nextn_predict_layers", None, also=(0,)),
    ),
    weights=(*trunk_weights(), *attention_weights(), *mlp_weights(), *moe_weights()),
    defaults={
        **_DEFAULTS,
        "first_k_dense_replace": 0,
        "intermediate_size": 7168,
        "moe_intermediate_size": 896,
        "norm_topk_prob": True,
        "num_key_value_heads": 4,
        "num_local_experts": 64,
        "rope_parameters": _THETAS,
        "sliding_window": 1024,
    },
)
