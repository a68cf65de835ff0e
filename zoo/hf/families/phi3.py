"""Phi-3, Phi-3.5 and Phi-4-mini, and the mixture of experts of Phi-3.5."""

from __future__ import annotations

from collections.abc import Iterator

from zoo.hf.families.shared import (
    LAYER,
    attention_weights,
    block_sparse_moe_weights,
    ends_weights,
    fused_mlp_weights,
    norm_weights,
    trunk_weights,
)
from zoo.hf.family import Family, Slot
from zoo.hf.layers import Always, Layers
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, Inert, Only, Window, heads, swiglu, trunk
from zoo.hf.weights import Fused, JointRow, Same, WeightRow
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

_ORIGINAL = "original_max_position_embeddings"


def _attention_weights() -> Iterator[WeightRow | JointRow]:
    qkv = tuple(f"layers.{{n}}.mixer.{part}.weight" for part in "qkv")
    yield Fused(qkv, f"{LAYER}.self_attn.qkv_proj.weight")
    yield Same("layers.{n}.mixer.out.weight", (f"{LAYER}.self_attn.o_proj.weight",))


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    slots={"attention": Slot(AttentionSpec), "mlp": Slot(MLPSpec)},
    layers=Layers(Always("attention"), Always("mlp"), {"dense": ("attention", "mlp")}),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Window("attention"),
        Rope(fraction=True, original=_ORIGINAL, aliases={"su": "longrope", "yarn": "longrope"}),
        *swiglu(),
        *(Only(key, False) for key in ("attention_bias", "mlp_bias", "lm_head_bias")),
        *(Only(key, 1) for key in ("full_attn_mod", "interpolate_factor")),
        *(Inert(key) for key in ("embd_pdrop", "resid_pdrop")),  # they act in training alone
    ),
    weights=(*trunk_weights(), *_attention_weights(), *fused_mlp_weights()),
    defaults={
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "num_key_value_heads": None,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
)

PHIMOE = Family(
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    slots={"attention": Slot(AttentionSpec), "moe": Slot(MoESpec)},
    layers=Layers(Always("attention"), Always("moe"), {"sparse": ("attention", "moe")}),
    rows=(
        *trunk(),
        Const("norm.type", "layer"),
        Const("norm.bias", True),
        Field("head.bias", "lm_head_bias"),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        Window("attention"),
        Rope(original=_ORIGINAL, mscales=True),
        Field("moe.num_experts", "num_local_experts num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        Const("moe.router.type", "sparse_mixer"),
        Field("moe.router.jitter", "router_jitter_noise"),
        Const("moe.router.arithmetic", "model"),
        Field("moe.balance.aux_loss", "router_aux_loss_coef"),
        Inert("input_jitter_noise"),  # it acts in training alone
    ),
    weights=(
        *ends_weights(biased=True),
        Same("head.bias", ("lm_head.bias",)),
        *norm_weights({"mixer_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}, biased=True),
        *attention_weights(),
        *block_sparse_moe_weights("router"),
    ),
    defaults={
        "attention_bias": False,
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "lm_head_bias": False,
        "max_position_embeddings": 131_072,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.01,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
)
