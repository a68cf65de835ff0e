"""Solar-Open."""

from __future__ import annotations

from zoo.hf.families.shared import (
    attention_weights,
    correction_bias,
    moe_weights,
    router_groups,
    shared_expert_weights,
    sigmoid_router,
    trunk_weights,
)
from zoo.hf.family import Family, Slot
from zoo.hf.layers import Always, Layers
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Field, Inert, Only, heads, trunk
from zoo.spec.attention import AttentionSpec
from zoo.spec.moe import MoESpec

SOLAR_OPEN = Family(
    model_type="solar_open",
    architecture="SolarOpenForCausalLM",
    slots={"attention": Slot(AttentionSpec), "moe": Slot(MoESpec)},
    layers=Layers(Always("attention"), Always("moe"), {"sparse": ("attention", "moe")}),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Rope(fraction=True),
        Only("use_qk_norm", False),
        Only("first_k_dense_replace", 0),
        Inert("intermediate_size"),
        Field("moe.num_experts", "n_routed_experts num_local_experts num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "moe_intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        Field("moe.num_shared_experts", "n_shared_experts"),
        *sigmoid_router(),
        *router_groups(),
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        *moe_weights(),
        correction_bias("gate.e_score_correction_bias"),
        *shared_expert_weights(),
    ),
    defaults={
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 131_072,
        "moe_intermediate_size": 1280,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
    },
)
