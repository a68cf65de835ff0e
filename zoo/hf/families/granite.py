"""Granite 3 mixture of experts."""

from __future__ import annotations

from zoo.hf.families.shared import LAYER, attention_weights, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.layers import Always, Layers
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, heads, inverse, multiplier, trunk
from zoo.hf.weights import Same
from zoo.spec.attention import AttentionSpec
from zoo.spec.moe import MoESpec

_MOE = f"{LAYER}.block_sparse_moe"

GRANITEMOE = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    slots={"attention": Slot(AttentionSpec), "moe": Slot(MoESpec)},
    layers=Layers(Always("attention"), Always("moe"), {"sparse": ("attention", "moe")}),
    rows=(
        *trunk(),
        multiplier("embedding.scale", "embedding_multiplier"),
        Field("residual_scale", "residual_multiplier"),
        inverse("head.scale", "logits_scaling"),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.scale", "attention_multiplier"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        Rope(),
        Field("moe.num_experts", "num_local_experts num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        Const("moe.router.type", "top_k"),
        Const("moe.router.score_chosen", True),
        Const("moe.router.normalize", False),
        Field("moe.balance.aux_loss", "router_aux_loss_coef"),
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        Same("layers.{n}.ffn.router.weight", (f"{_MOE}.router.layer.weight", f"{_MOE}.router.weight")),
        Same("layers.{n}.ffn.experts.gate_up", (f"{_MOE}.input_linear.weight", f"{_MOE}.experts.gate_up_proj")),
        Same("layers.{n}.ffn.experts.down", (f"{_MOE}.output_linear.weight", f"{_MOE}.experts.down_proj")),
    ),
    defaults={
        "attention_bias": False,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "logits_scaling": 1.0,
        "max_position_embeddings": 2048,
        "num_experts_per_tok": 2,
        "num_key_value_heads": None,
        "num_local_experts": 8,
        "residual_multiplier": 1.0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    },
)
