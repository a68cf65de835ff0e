"""OLMo Hybrid: three layers of the gated delta rule, then one of attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from zoo.hf.families.qwen_next import delta_rows
from zoo.hf.families.shared import LAYER, attention_weights, mlp_weights, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys
from zoo.hf.layers import Always, Layers, Listed
from zoo.hf.rope import Rope
from zoo.hf.rows import Const, Field, Inert, Only, Tree, heads, swiglu, trunk
from zoo.hf.weights import Same, Split, WeightRow
from zoo.spec.attention import AttentionSpec
from zoo.spec.delta import DeltaSpec
from zoo.spec.mlp import MLPSpec

_OURS = "layers.{n}.mixer"


def _last_full(keys: Keys, num_layers: int) -> list[str]:
    """Every fourth layer is full; of fewer than four the last."""
    chosen = ["attention" if layer % 4 == 3 else "delta" for layer in range(num_layers)]
    return chosen if "attention" in chosen else [*chosen[:-1], "attention"]


def _separate_delta_weights(spec: DeltaSpec) -> Iterator[WeightRow]:
    theirs = f"{LAYER}.linear_attn"
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "beta": "b_proj", "decay": "a_proj"}
    for ours, name in {**names, "gate": "g_proj", "norm": "o_norm", "out": "o_proj"}.items():
        yield Same(f"{_OURS}.{ours}.weight", (f"{theirs}.{name}.weight",))
    parts = tuple(f"{theirs}.{part}_conv1d.weight" for part in "qkv")
    widths = (spec.qk_heads * spec.head_dim, spec.qk_heads * spec.head_dim, spec.num_heads * spec.v_width)
    yield Split(f"{_OURS}.conv.weight", parts, widths, f"{theirs}.conv1d.weight")
    yield Same(f"{_OURS}.a_log", (f"{theirs}.A_log",))
    yield Same(f"{_OURS}.dt_bias", (f"{theirs}.dt_bias",))


class DeltaWidths:
    """Widths of the delta rule that a config may leave out."""

    def read(self, keys: Keys, model: Tree) -> None:
        num_heads, hidden = keys.take("num_attention_heads"), keys.take("hidden_size")
        qk_heads = keys.take("linear_num_key_heads", None) or num_heads
        head_dim = keys.take("linear_key_head_dim", None) or int(0.75 * hidden / qk_heads)
        model.set("delta.num_qk_heads", qk_heads)
        model.set("delta.num_heads", keys.take("linear_num_value_heads", None) or num_heads)
        model.set("delta.head_dim", head_dim)
        model.set("delta.v_head_dim", keys.take("linear_value_head_dim", None) or 2 * head_dim)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        for row in delta_rows():
            row.write(model, config)


class NullableRope(Rope):
    """Rotary positions, unless their base is null."""

    def read(self, keys: Keys, model: Tree) -> None:
        parameters = keys.take("rope_parameters", None)
        if isinstance(parameters, Mapping) and "rope_theta" in parameters and parameters["rope_theta"] is None:
            keys.take("rope_theta", None)
            model.set(f"{self.slot}.rope", None)
        else:
            super().read(keys, model)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        if model.get(f"{self.slot}.rope") is None:
            config["rope_parameters"] = {"rope_type": "default", "rope_theta": None}
        else:
            super().write(model, config)


# transformers saves the norm after attention under the name of one before an MLP, and reads both names.
_AFTER_ATTENTION = (f"{LAYER}.feedforward_layer_norm.weight", f"{LAYER}.post_attention_layernorm.weight")

OLMO_HYBRID = Family(
    model_type="olmo_hybrid",
    architecture="OlmoHybridForCausalLM",
    slots={
        "attention": Slot(AttentionSpec),
        "delta": Slot(DeltaSpec, weights=_separate_delta_weights),
        "mlp": Slot(MLPSpec),
    },
    layers=Layers(
        Listed("layer_types", {"linear_attention": "delta", "full_attention": "attention"}, _last_full),
        Always("mlp"),
        {"linear": ("delta", "mlp"), "full": ("attention", "mlp")},
        options={"full": {"placement": "post"}},
    ),
    rows=(
        *trunk(),
        Const("norm.weight", "wide"),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Const("attention.qk_norm", "full"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        NullableRope(),
        DeltaWidths(),
        Field("delta.conv_width", "linear_conv_kernel_dim"),
        Field("delta.beta_scale", "linear_allow_neg_eigval", {True: 2.0, False: 1.0}),
        Const("delta.norm_eps", 1e-5),
        *swiglu(),
        Only("hidden_act", "silu"),
        *map(Inert, ("linear_a_log_max", "linear_a_log_min", "linear_dt_init_floor", "linear_dt_max", "linear_dt_min")),
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        *mlp_weights(),
        Same(
            "layers.{n}.mixer_norm.weight",
            (f"{LAYER}.attention_layer_norm.weight", f"{LAYER}.input_layernorm.weight"),
        ),
        Same("layers.{n}.ffn_norm.weight", _AFTER_ATTENTION),
        Same("layers.{n}.mixer_post_norm.weight", _AFTER_ATTENTION),
        Same("layers.{n}.ffn_post_norm.weight", (f"{LAYER}.post_feedforward_layernorm.weight",)),
    ),
    defaults={
        "attention_bias": False,
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "linear_allow_neg_eigval": True,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 65_536,
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    },
)
