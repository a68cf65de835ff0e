"""OLMo 2 and 3."""

from __future__ import annotations

from collections.abc import Iterator

from zoo.hf.families.shared import attention_weights, ends_weights, mlp_weights, norm_weights
from zoo.hf.family import Family, Slot
from zoo.hf.layers import Always, Layers, every_fourth_full, windows
from zoo.hf.rope import Rope, RopeByType
from zoo.hf.rows import Const, Field, Row, heads, swiglu, trunk
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec

_NORMS = {"mixer_post_norm": "post_attention_layernorm", "ffn_post_norm": "post_feedforward_layernorm"}
_WEIGHTS = (*ends_weights(), *norm_weights(_NORMS), *attention_weights(), *mlp_weights())
_DEFAULTS = {
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}


def _rows() -> Iterator[Row]:
    yield from trunk()
    yield Const("norm.weight", "wide")
    yield Const("norm_placement", "post")
    yield from heads()
    yield Const("attention.qk_norm", "full")
    yield Field("attention.qkv_bias", "attention_bias")
    yield Field("attention.out_bias", "attention_bias")
    yield from swiglu()


OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    slots={"attention": Slot(AttentionSpec), "mlp": Slot(MLPSpec)},
    layers=Layers(Always("attention"), Always("mlp"), {"dense": ("attention", "mlp")}),
    rows=(*_rows(), Rope()),
    weights=_WEIGHTS,
    defaults=_DEFAULTS,
)

OLMO3 = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    slots={
        "attention": Slot(AttentionSpec, {"mask": "causal"}),
        "local": Slot(AttentionSpec, {"mask": "sliding"}, like="attention"),
        "mlp": Slot(MLPSpec),
    },
    layers=Layers(windows(every_fourth_full), Always("mlp"), {"full": ("attention", "mlp"), "local": ("local", "mlp")}),
    rows=(
        *_rows(),
        Const("local.mask", "sliding"),
        Field("local.window", "sliding_window"),
        RopeByType(
            {"full_attention": "attention", "sliding_attention": "local"},
            {"full_attention": "rope_theta", "sliding_attention": "rope_theta"},
        ),
    ),
    weights=_WEIGHTS,
    defaults={**_DEFAULTS, "rope_theta": 500_000.0, "sliding_window": 4096},
)
