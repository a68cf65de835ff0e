"""MiniMax-M2."""

from __future__ import annotations

from zoo.hf.families.shared import LAYER, attention_weights, block_sparse_moe_weights, sigmoid_router, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.layers import Always, Layers
from zoo.hf.mtp import MTP
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, Inert, Only, heads, trunk
from zoo.hf.weights import Same
from zoo.spec.attention import AttentionSpec
from zoo.spec.moe import MoESpec

_BIAS = (f"{LAYER}.block_sparse_moe.e_score_correction_bias", f"{LAYER}.mlp.e_score_correction_bias")

MINIMAX_M2 = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    slots={"attention": Slot(AttentionSpec), "moe": Slot(MoESpec)},
    layers=Layers(Always("attention"), Always("moe"), {"sparse": ("attention", "moe")}),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Only("use_qk_norm", True),
        Only("qk_norm_type", "per_layer"),
        Const("attention.qk_norm", "full"),
        Rope(fraction=True, rotary_dim="rotary_dim"),
        Field("moe.num_experts", "num_local_experts num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        *sigmoid_router(scale=None, arithmetic="mixed"),
        Only("scoring_func", "sigmoid"),
        Only("use_routing_bias", True),
        Only("shared_intermediate_size", 0),
        Only("router_jitter_noise", 0.0),
        Inert("router_aux_loss_coef"),
        MTP("sparse", key="num_mtp_modules"),
        Inert("use_mtp"),
        Only("mtp_transformer_layers", 1),
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        *block_sparse_moe_weights(),
        Same("layers.{n}.ffn.router.correction_bias", _BIAS),
    ),
    defaults={
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 196_608,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "num_local_experts": 256,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5_000_000.0,
        "rotary_dim": None,
        "tie_word_embeddings": False,
    },
)
