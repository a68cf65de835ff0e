"""Llama 2, 3, 3.1, 3.2 and the many models that took over their architecture."""

from __future__ import annotations

from zoo.hf.families.shared import attention_weights, mlp_weights, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.layers import Always, Layers
from zoo.hf.rope import Rope
from zoo.hf.rows import Field, Inert, Only, heads, swiglu, trunk
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    slots={"attention": Slot(AttentionSpec), "mlp": Slot(MLPSpec)},
    layers=Layers(Always("attention"), Always("mlp"), {"dense": ("attention", "mlp")}),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        Rope(),
        Only("rope_interleaved", False),
        Inert("is_llama_config"),
        *swiglu(),
        Field("mlp.bias", "mlp_bias"),
    ),
    weights=(*trunk_weights(), *attention_weights(), *mlp_weights()),
    defaults={
        "attention_bias": False,
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    },
)
