"""Step-3.5 and Step-3.7 (text)."""

from __future__ import annotations

from zoo.hf.families.shared import LAYER, attention_weights, mlp_weights, sigmoid_router, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.layers import FirstDense, Layers, Listed, all_full
from zoo.hf.mtp import MTP, MTPNames
from zoo.hf.rope import RopeByType
from zoo.hf.rows import Const, Field, Inert, Only, SharedWidth, heads, inverse_root, swiglu, trunk
from zoo.hf.weights import Bands, Same
from zoo.hf.wrapped import LAYOUTS, OTHER_WEIGHTS
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

_TYPES = {"full_attention": "attention", "sliding_attention": "local"}
_HUB, _MEMORY = f"{LAYER}.moe", f"{LAYER}.mlp"

STEP3P5 = Family(
    model_type="step3p5",
    architecture="Step3p5ForCausalLM",
    layouts=LAYOUTS,
    ignored_weights=OTHER_WEIGHTS,
    slots={
        "attention": Slot(AttentionSpec, {"mask": "causal"}),
        "local": Slot(AttentionSpec, {"mask": "sliding"}, like="attention"),
        "mlp": Slot(MLPSpec),
        "moe": Slot(MoESpec),
    },
    layers=Layers(
        Listed("layer_types", _TYPES, all_full),
        FirstDense(write_list=True),
        {
            "dense": ("attention", "mlp"),
            "sparse": ("attention", "moe"),
            "local_dense": ("local", "mlp"),
            "local_sparse": ("local", "moe"),
        },
    ),
    rows=(
        *trunk(),
        Const("norm.weight", "plus_one"),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        Const("attention.qk_norm", "head"),
        Const("attention.gate", "head"),
        inverse_root("attention.scale", "query_pre_attn_scalar"),
        Const("local.mask", "sliding"),
        Field("local.window", "sliding_window"),
        Field("local.num_heads", "num_sliding_attention_heads", if_null="num_attention_heads"),
        RopeByType(_TYPES, fraction=True),
        *swiglu(),
        Only("mlp_bias", False),
        Field("moe.num_experts", "n_routed_experts moe_num_experts num_local_experts"),
        Field("moe.top_k", "num_experts_per_tok moe_top_k"),
        Field("moe.d_expert", "moe_intermediate_size"),
        SharedWidth("moe", "share_expert_dim"),
        *sigmoid_router("moe_router_scaling_factor", arithmetic="mixed"),
        *(Only(key, None) for key in ("swiglu_limits", "swiglu_limits_shared", "mtp_layer_types")),
        Only("mtp_mlp_layer_types", None),
        MTP("sparse"),
        Inert("per_layer_config"),  # says the head counts again
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        Same("layers.{n}.mixer.gate.weight", (f"{LAYER}.self_attn.g_proj.weight",)),
        *mlp_weights(),
        Same("layers.{n}.ffn.router.weight", (f"{_HUB}.gate.weight", f"{_MEMORY}.gate.weight")),
        Same(
            "layers.{n}.ffn.router.correction_bias",
            (f"{_HUB}.router_bias", f"{_MEMORY}.gate.e_score_correction_bias"),
        ),
        Bands(
            "layers.{n}.ffn.experts.gate_up",
            (f"{_HUB}.gate_proj.weight", f"{_HUB}.up_proj.weight"),
            f"{_MEMORY}.experts.gate_up_proj",
        ),
        Same("layers.{n}.ffn.experts.down", (f"{_HUB}.down_proj.weight", f"{_MEMORY}.experts.down_proj")),
        *(
            Same(
                f"layers.{{n}}.ffn.shared.{part}.weight",
                tuple(f"{LAYER}.{name}.{part}_proj.weight" for name in ("share_expert", "mlp.shared_experts")),
            )
            for part in ("gate", "up", "down")
        ),
    ),
    defaults={
        "attention_bias": False,
        "first_k_dense_replace": 3,
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 11_264,
        "max_position_embeddings": 128_000,
        "mlp_bias": False,
        "moe_intermediate_size": 1280,
        "moe_router_scaling_factor": 1.0,
        "n_routed_experts": 288,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "num_sliding_attention_heads": None,
        "query_pre_attn_scalar": None,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}},
        "rope_theta": 10_000.0,
        "share_expert_dim": 1280,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    # Blocks of multi-token prediction stand under further numbers of layers.
    mtp=MTPNames(),
)
