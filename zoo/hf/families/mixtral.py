"""Mixtral."""

from __future__ import annotations

from zoo.hf.families.shared import attention_weights, block_sparse_moe_weights, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.layers import Always, Layers
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, Only, Window, heads, trunk
from zoo.spec.attention import AttentionSpec
from zoo.spec.moe import MoESpec

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    slots={"attention": Slot(AttentionSpec), "moe": Slot(MoESpec)},
    layers=Layers(Always("attention"), Always("moe"), {"sparse": ("attention", "moe")}),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Window("attention"),
        Rope(),
        Field("moe.num_experts", "num_local_experts num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        Field("moe.balance.aux_loss", "router_aux_loss_coef"),
        Only("router_jitter_noise", 0.0),
        Const("moe.router.type", "top_k"),
        Const("moe.router.normalize", True),
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        *block_sparse_moe_weights(),
    ),
    defaults={
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 131_072,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
)
