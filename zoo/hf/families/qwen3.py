"""Qwen3, dense and mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zoo.hf.families.shared import attention_weights, mlp_weights, moe_weights, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys, refused
from zoo.hf.layers import Always, Layers, Listed, SparseSteps
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, Inert, Only, Window, heads, swiglu, trunk
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

_DEFAULTS = {
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}


class LateWindows(Listed):
    """`layer_types`; without it, layers from `max_window_layers` on slide if `use_sliding_window` is true."""

    def __init__(self, rule: Callable[[Keys, int], list[str]] | None = None) -> None:
        slots = {"full_attention": "attention", "sliding_attention": "local"}
        super().__init__("layer_types", slots, rule or _late_windows)

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        chosen = super().read(keys, num_layers)
        if "local" in chosen and not keys.take("use_sliding_window"):
            raise refused("use_sliding_window", False, "must be true where layer_types has sliding_attention")
        return chosen

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        super().write(chosen, config)
        config["use_sliding_window"] = "local" in chosen
        # For readers that do not know layer_types; they cannot say it of windows that come early.
        config["max_window_layers"] = chosen.index("local") if "local" in chosen else len(chosen)


def _late_windows(keys: Keys, num_layers: int) -> list[str]:
    first = keys.integer("max_window_layers", 0, 1_000_000)
    slides = keys.take("use_sliding_window") and keys.take("sliding_window") is not None
    return ["local" if slides and layer >= first else "attention" for layer in range(num_layers)]


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    slots={
        "attention": Slot(AttentionSpec, {"mask": "causal"}),
        "local": Slot(AttentionSpec, {"mask": "sliding"}, like="attention"),
        "mlp": Slot(MLPSpec),
    },
    layers=Layers(LateWindows(), Always("mlp"), {"dense": ("attention", "mlp"), "local": ("local", "mlp")}),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        Const("attention.qk_norm", "head"),
        Rope(),
        Const("local.mask", "sliding"),
        Field("local.window", "sliding_window"),
        *swiglu(),
    ),
    weights=(*trunk_weights(), *attention_weights(), *mlp_weights()),
    defaults={**_DEFAULTS, "head_dim": 128, "max_window_layers": 28},
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    slots={"attention": Slot(AttentionSpec), "mlp": Slot(MLPSpec), "moe": Slot(MoESpec)},
    layers=Layers(Always("attention"), SparseSteps(), {"dense": ("attention", "mlp"), "sparse": ("attention", "moe")}),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        Const("attention.qk_norm", "head"),
        Only("qkv_bias", False),
        Only("use_qk_norm", True),
        Rope(),
        Window("attention", switch="use_sliding_window"),
        Inert("max_window_layers"),
        *swiglu(),
        Field("moe.num_experts", "num_experts num_local_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "moe_intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        Field("moe.router.normalize", "norm_topk_prob"),
        Field("moe.balance.aux_loss", "router_aux_loss_coef"),
        Const("moe.router.type", "top_k"),
        Only("shared_expert_intermediate_size", 0),
    ),
    weights=(*trunk_weights(), *attention_weights(), *mlp_weights(), *moe_weights()),
    defaults={
        **_DEFAULTS,
        "decoder_sparse_step": 1,
        "head_dim": None,
        "intermediate_size": 6144,
        "mlp_only_layers": None,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.001,
    },
)
