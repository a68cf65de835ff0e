"""Gemma 1, 2 and 3 (text)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.hf.families.shared import (
    SANDWICH,
    attention_weights,
    ends_weights,
    mlp_weights,
    norm_weights,
    trunk_weights,
)
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys
from zoo.hf.layers import Always, Layers, every_second_full, windows
from zoo.hf.rope import Rope, RopeByType
from zoo.hf.rows import ACTIVATIONS, Const, Field, Inert, Only, Row, heads, inverse_root, trunk
from zoo.hf.wrapped import LAYOUTS, OTHER_WEIGHTS
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec

SLOTS = {
    "attention": Slot(AttentionSpec, {"mask": "causal"}),
    "local": Slot(AttentionSpec, {"mask": "sliding"}, like="attention"),
    "mlp": Slot(MLPSpec),
}
GELU = {"gelu_pytorch_tanh": "gelu_tanh", **ACTIVATIONS}
# The first releases say `gelu` and mean its tanh form.
_OLD_GELU = {**GELU, "gelu": "gelu_tanh"}
KINDS = {"full": ("attention", "mlp"), "local": ("local", "mlp")}
_DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "head_dim": 256,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def _common() -> Iterator[Row]:
    """What all three say."""
    yield from trunk()
    yield Const("norm.weight", "plus_one")
    yield Const("embedding.scale", "sqrt_d_model")
    yield from heads()
    yield Field("attention.head_dim", "head_dim")
    yield Field("attention.qkv_bias", "attention_bias")
    yield Field("attention.out_bias", "attention_bias")
    yield Field("mlp.d_ffn", "intermediate_size")
    yield Only("use_bidirectional_attention", False, also=(None,))


def _windowed() -> Iterator[Row]:
    """What the second and the third say."""
    yield from _common()
    yield Const("norm_placement", "sandwich")
    yield inverse_root("attention.scale", "query_pre_attn_scalar")
    yield Field("attention.softcap", "attn_logit_softcapping")
    yield Field("head.softcap", "final_logit_softcapping")
    yield Const("local.mask", "sliding")
    yield Field("local.window", "sliding_window")
    yield Field("mlp.activation", "hidden_activation", GELU)


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    slots={"attention": Slot(AttentionSpec), "mlp": Slot(MLPSpec)},
    layers=Layers(Always("attention"), Always("mlp"), {"dense": ("attention", "mlp")}),
    rows=(*_common(), Field("mlp.activation", "hidden_act", _OLD_GELU), Inert("hidden_activation"), Rope()),
    weights=(*trunk_weights(), *attention_weights(), *mlp_weights()),
    defaults={**_DEFAULTS, "hidden_act": "gelu_pytorch_tanh"},
)

GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    slots=SLOTS,
    layers=Layers(windows(every_second_full), Always("mlp"), KINDS),
    rows=(*_windowed(), Rope(), Inert("hidden_act")),
    weights=(*ends_weights(), *norm_weights(SANDWICH), *attention_weights(), *mlp_weights()),
    defaults={
        **_DEFAULTS,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
)


def by_pattern(keys: Keys, num_layers: int) -> list[str]:
    """Every `sliding_window_pattern`-th layer sees all."""
    step = keys.integer("sliding_window_pattern", 1, 1_000_000)
    return ["attention" if (layer + 1) % step == 0 else "local" for layer in range(num_layers)]


GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    layouts=LAYOUTS,
    ignored_weights=OTHER_WEIGHTS,
    slots=SLOTS,
    layers=Layers(windows(by_pattern), Always("mlp"), KINDS),
    rows=(
        *_windowed(),
        Const("attention.qk_norm", "head"),
        Inert("_sliding_window_pattern"),
        RopeByType(
            {"full_attention": "attention", "sliding_attention": "local"},
            {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"},
        ),
    ),
    weights=(*ends_weights(), *norm_weights(SANDWICH), *attention_weights(), *mlp_weights()),
    defaults={
        **_DEFAULTS,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 131_072,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "rope_local_base_freq": 10_000.0,
        "rope_theta": 1_000_000.0,
        "sliding_window_pattern": 6,
        "vocab_size": 262_208,
    },
)
