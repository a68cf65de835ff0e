"""GLM-4-0414 and GLM-4.5 to 4.7."""

from __future__ import annotations

from zoo.hf.families.shared import (
    attention_weights,
    correction_bias,
    ends_weights,
    fused_mlp_weights,
    mlp_weights,
    moe_weights,
    norm_weights,
    router_groups,
    shared_expert_weights,
    sigmoid_router,
    trunk_weights,
)
from zoo.hf.family import Family, Slot
from zoo.hf.layers import Always, FirstDense, Layers
from zoo.hf.mtp import MTP, MTPNames
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, heads, swiglu, trunk
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

_SANDWICH = {
    "mixer_norm": "input_layernorm",
    "mixer_post_norm": "post_self_attn_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_mlp_layernorm",
}
_DEFAULTS = {
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131_072,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}

GLM4 = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    slots={"attention": Slot(AttentionSpec), "mlp": Slot(MLPSpec)},
    layers=Layers(Always("attention"), Always("mlp"), {"dense": ("attention", "mlp")}),
    rows=(
        *trunk(),
        Const("norm_placement", "sandwich"),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Rope(fraction=True),
        Const("attention.rope.layout", "interleaved"),
        *swiglu(),
    ),
    weights=(*ends_weights(), *norm_weights(_SANDWICH), *attention_weights(), *fused_mlp_weights()),
    defaults={
        **_DEFAULTS,
        "attention_bias": True,
        "head_dim": 128,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1.5625e-07,
    },
)

GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    slots={"attention": Slot(AttentionSpec), "mlp": Slot(MLPSpec), "moe": Slot(MoESpec)},
    layers=Layers(Always("attention"), FirstDense(), {"dense": ("attention", "mlp"), "sparse": ("attention", "moe")}),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.qk_norm", "use_qk_norm", {True: "head", False: "none"}),
        Rope(fraction=True),
        *swiglu(),
        Field("moe.num_experts", "n_routed_experts num_local_experts num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "moe_intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        Field("moe.num_shared_experts", "n_shared_experts"),
        *sigmoid_router(),
        *router_groups(),
        MTP("sparse"),
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        *mlp_weights(),
        *moe_weights(),
        correction_bias("gate.e_score_correction_bias"),
        *shared_expert_weights(),
    ),
    defaults={
        **_DEFAULTS,
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "intermediate_size": 10_944,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": False,
    },
    mtp=MTPNames(),
)
