"""Mistral and Ministral 3."""

from __future__ import annotations

from zoo.hf.families.shared import attention_weights, mlp_weights, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.layers import Always, Layers
from zoo.hf.rope import Rope
from zoo.hf.rows import Field, Window, heads, swiglu, trunk
from zoo.hf.wrapped import LAYOUTS, OTHER_WEIGHTS
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec

_DEFAULTS = {
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
_WEIGHTS = (*trunk_weights(), *attention_weights(), *mlp_weights())

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    layouts=LAYOUTS,
    ignored_weights=OTHER_WEIGHTS,
    slots={"attention": Slot(AttentionSpec), "mlp": Slot(MLPSpec)},
    layers=Layers(Always("attention"), Always("mlp"), {"dense": ("attention", "mlp")}),
    rows=(*trunk(), *heads(), Field("attention.head_dim", "head_dim"), Window("attention"), Rope(), *swiglu()),
    weights=_WEIGHTS,
    defaults=_DEFAULTS,
)

MINISTRAL3 = Family(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    layouts=LAYOUTS,
    ignored_weights=OTHER_WEIGHTS,
    slots={"attention": Slot(AttentionSpec), "mlp": Slot(MLPSpec)},
    layers=Layers(Always("attention"), Always("mlp"), {"dense": ("attention", "mlp")}),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Window("attention"),
        Rope(query_scale=True, nested=True, without_effect=("max_position_embeddings",)),
        *swiglu(),
    ),
    weights=_WEIGHTS,
    defaults={
        **_DEFAULTS,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 16_384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        "sliding_window": None,
    },
)
