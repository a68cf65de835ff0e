"""SmolLM3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoo.hf.families.shared import attention_weights, mlp_weights, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys, refused
from zoo.hf.layers import Always, Layers, Listed
from zoo.hf.rope import Rope
from zoo.hf.rows import Const, Field, Inert, Tree, heads, swiglu, trunk
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec

# Layers by two properties: a window or none, rotary positions or none.
_NAMES = {(False, True): "attention", (False, False): "nope", (True, True): "local", (True, False): "local_nope"}


class _Mixers(Listed):
    """`no_rope_layers` holds 0 where there are no positions; `layer_types` says which layers have windows."""

    def __init__(self) -> None:
        super().__init__("layer_types", {"full_attention": "causal", "sliding_attention": "sliding"}, _sliding_if_nope)

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        masks, rotary = super().read(keys, num_layers), _rotary(keys, num_layers)
        slides = bool(keys.take("use_sliding_window"))
        return [_NAMES[slides and mask == "sliding", turns] for mask, turns in zip(masks, rotary, strict=True)]

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        windowed = [str(slot).startswith("local") for slot in chosen]
        config["layer_types"] = ["sliding_attention" if there else "full_attention" for there in windowed]
        config["use_sliding_window"] = any(windowed)
        config["no_rope_layers"] = [int(slot in ("attention", "local")) for slot in chosen]


def _rotary(keys: Keys, num_layers: int) -> list[bool]:
    step = keys.integer("no_rope_layer_interval", 1, 1_000_000)
    listed = keys.take("no_rope_layers", None)
    if listed is None:
        return [(layer + 1) % step != 0 for layer in range(num_layers)]
    if not isinstance(listed, list) or len(listed) != num_layers:
        raise refused("no_rope_layers", listed, f"must be a list of {num_layers} numbers 0 or 1, one for each layer")
    return [bool(flag) for flag in listed]


def _sliding_if_nope(keys: Keys, num_layers: int) -> list[str]:
    slides = keys.take("use_sliding_window") and keys.take("sliding_window") is not None
    return ["sliding" if slides and not turns else "causal" for turns in _rotary(keys, num_layers)]


class _Rope(Rope):
    """One rotary embedding, in the layers that have one."""

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        if model.get("attention.rope") is None and model.has("local"):
            model = Tree({**model.data, "attention": model.data["local"]})
        super().write(model, config)


SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    slots={
        "nope": Slot(AttentionSpec, {"mask": "causal", "rope": None}, like="attention"),
        "local_nope": Slot(AttentionSpec, {"mask": "sliding", "rope": None}, like="attention"),
        "attention": Slot(AttentionSpec, {"mask": "causal"}),
        "local": Slot(AttentionSpec, {"mask": "sliding"}, like="attention"),
        "mlp": Slot(MLPSpec),
    },
    layers=Layers(
        _Mixers(),
        Always("mlp"),
        {
            "dense": ("attention", "mlp"),
            "nope": ("nope", "mlp"),
            "local": ("local", "mlp"),
            "local_nope": ("local_nope", "mlp"),
        },
    ),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        _Rope(),
        *(Const(f"{slot}.rope", None) for slot in ("nope", "local_nope")),
        *(Const(f"{slot}.mask", "sliding") for slot in ("local", "local_nope")),
        *(Field(f"{slot}.window", "sliding_window") for slot in ("local", "local_nope")),
        *swiglu(),
        Field("mlp.bias", "mlp_bias"),
        Inert("max_window_layers"),
    ),
    weights=(*trunk_weights(), *attention_weights(), *mlp_weights()),
    defaults={
        "attention_bias": False,
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32_768,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2_000_000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
)
