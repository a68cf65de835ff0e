"""OLMoE."""

from __future__ import annotations

from zoo.hf.families.shared import attention_weights, moe_weights, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.layers import Always, Layers
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, Only, heads, trunk
from zoo.spec.attention import AttentionSpec
from zoo.spec.moe import MoESpec

OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    slots={"attention": Slot(AttentionSpec), "moe": Slot(MoESpec)},
    layers=Layers(Always("attention"), Always("moe"), {"sparse": ("attention", "moe")}),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        Const("attention.qk_norm", "full"),
        Only("clip_qkv", None),  # it would clamp between norm and rotation
        Rope(),
        Field("moe.num_experts", "num_experts num_local_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        Field("moe.router.normalize", "norm_topk_prob"),
        Field("moe.balance.aux_loss", "router_aux_loss_coef"),
        Const("moe.router.type", "top_k"),
    ),
    weights=(*trunk_weights(), *attention_weights(), *moe_weights()),
    defaults={
        "attention_bias": False,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
    },
)
