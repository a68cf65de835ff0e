"""Hunyuan-A13B and Hy3."""

from __future__ import annotations

from zoo.hf.families.shared import (
    LAYER,
    attention_weights,
    correction_bias,
    mlp_weights,
    moe_weights,
    shared_expert_weights,
    sigmoid_router,
    trunk_weights,
)
from zoo.hf.family import Family, Slot
from zoo.hf.layers import Always, FirstDense, Layers
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Agrees, Const, Field, Inert, Only, Uniform, heads, swiglu, trunk
from zoo.hf.weights import Experts, Same
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

# Of variants that share the configuration class and that this one is not.
_OFF = ("use_cla", "use_mla", "position_embedding_xdrope", "group_limited_greedy", "mlp_bias")
_ON = ("use_qk_norm", "use_rotary_pos_emb", "norm_topk_prob")
_WITHOUT_USE = """
    cla_share_factor dense_list eod_token_id pad_id im_start_id im_end_id text_start_id text_end_id
    kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_group topk_group
    moe_drop_tokens moe_random_routing_dropped_token use_mixed_mlp_moe
"""

HUNYUAN_V1_MOE = Family(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    slots={"attention": Slot(AttentionSpec), "moe": Slot(MoESpec)},
    layers=Layers(Always("attention"), Always("moe"), {"sparse": ("attention", "moe")}),
    rows=(
        *trunk(),
        *(row for row in heads() if row != Only("attention_dropout", 0.0)),
        Inert("attention_dropout"),  # it acts in training alone
        Field("attention.head_dim", "head_dim attention_head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        Const("attention.qk_norm", "head"),
        Const("attention.qk_norm_after_rope", True),
        Rope(alpha=True),
        Uniform("moe.num_experts", "num_experts num_local_experts"),
        Uniform("moe.top_k", "moe_topk num_experts_per_tok"),
        Field("moe.d_expert", "intermediate_size"),
        Agrees("moe_intermediate_size", "moe.d_expert"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        Const("moe.num_shared_experts", 1),
        Agrees("num_shared_expert", "moe.num_shared_experts"),
        Const("moe.router.type", "top_k"),
        Const("moe.router.arithmetic", "fp32"),
        Only("norm_type", "rms"),
        Only("routed_scaling_factor", 1.0),
        Only("moe_layer_num_skipped", 0),
        *(Only(key, False) for key in _OFF),
        *(Only(key, True) for key in _ON),
        *(Inert(key) for key in _WITHOUT_USE.split()),
    ),
    weights=(
        *trunk_weights(),
        *(row for row in attention_weights() if "norm" not in row.zoo),
        Same("layers.{n}.mixer.q_norm.weight", (f"{LAYER}.self_attn.query_layernorm.weight",)),
        Same("layers.{n}.mixer.k_norm.weight", (f"{LAYER}.self_attn.key_layernorm.weight",)),
        *(row for row in moe_weights() if isinstance(row, Experts)),
        Same("layers.{n}.ffn.router.weight", (f"{LAYER}.mlp.gate.wg.weight",)),
        *shared_expert_weights("shared_mlp"),
    ),
    defaults={
        "attention_bias": False,
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "moe_topk": 1,
        "num_experts": 1,
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    },
)

HY_V3 = Family(
    model_type="hy_v3",
    architecture="HYV3ForCausalLM",
    slots={"attention": Slot(AttentionSpec), "mlp": Slot(MLPSpec), "moe": Slot(MoESpec)},
    layers=Layers(
        Always("attention"),
        FirstDense(write_list=True),
        {"dense": ("attention", "mlp"), "sparse": ("attention", "moe")},
    ),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        Const("attention.qk_norm", "head"),
        Rope(),
        *swiglu(),
        Only("mlp_bias", False),
        Field("moe.num_experts", "num_experts num_local_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "moe_intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        Field("moe.num_shared_experts", "num_shared_experts"),
        Field("moe.combine", "enable_moe_fp32_combine", {True: "fp32", False: "model"}),
        *sigmoid_router("router_scaling_factor"),
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        *mlp_weights(),
        *(row for row in moe_weights() if isinstance(row, Experts)),
        Same("layers.{n}.ffn.router.weight", (f"{LAYER}.mlp.router.gate.weight", f"{LAYER}.mlp.gate.weight")),
        correction_bias("expert_bias", "e_score_correction_bias"),
        *(
            Same(
                f"layers.{{n}}.ffn.shared.{part}.weight",
                tuple(f"{LAYER}.mlp.{name}.{part}_proj.weight" for name in ("shared_mlp", "shared_experts")),
            )
            for part in ("gate", "up", "down")
        ),
    ),
    defaults={
        "attention_bias": False,
        "enable_moe_fp32_combine": True,
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.006,
        "intermediate_size": 13_312,
        "max_position_embeddings": 131_072,
        "moe_intermediate_size": 1536,
        "num_experts": 192,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "num_shared_experts": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 11_158_840.0,
        "router_scaling_factor": 2.826,
        "tie_word_embeddings": False,
    },
)
