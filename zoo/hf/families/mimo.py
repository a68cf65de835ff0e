"""MiMo-V2-Flash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoo.hf.families.shared import (
    LAYER,
    attention_weights,
    correction_bias,
    mlp_weights,
    moe_weights,
    router_groups,
    sigmoid_router,
    trunk_weights,
)
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys, refused
from zoo.hf.layers import FirstDense, Layers, windows
from zoo.hf.rope import RopeByType
from zoo.hf.rows import ACTIVATIONS, Agrees, Computed, Const, Field, Inert, Only, Tree, heads, swiglu, trunk
from zoo.hf.weights import Same
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec


def _first_and_sixths_full(keys: Keys, num_layers: int) -> list[str]:
    """`hybrid_layer_pattern` holds 1 for windows; without it, the first layer and every sixth see all."""
    pattern = keys.take("hybrid_layer_pattern", None)
    if pattern is None:
        pattern = [int(layer > 0 and (layer + 1) % 6 != 0) for layer in range(num_layers)]
    if not isinstance(pattern, list) or len(pattern) != num_layers:
        raise refused("hybrid_layer_pattern", pattern, f"must be a list of {num_layers} numbers 0 or 1")
    return ["local" if windowed else "attention" for windowed in pattern]


@dataclass(frozen=True)
class _FFNs(FirstDense):
    """`moe_layer_freq` holds 1 for sparse layers, or `mlp_layer_types` names them."""

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        flags = keys.take("moe_layer_freq", None)
        if not isinstance(flags, list) or keys.config.get("mlp_layer_types") is not None:
            return super().read(keys, num_layers)
        if len(flags) != num_layers:
            raise refused("moe_layer_freq", flags, f"must be a list of {num_layers} numbers 0 or 1")
        return ["moe" if flag else "mlp" for flag in flags]

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        super().write(chosen, config)
        config["moe_layer_freq"] = [int(slot == "moe") for slot in chosen]


@dataclass(frozen=True)
class _LocalHeads:
    """Layers with windows have twice as many keys, as the class in transformers has it."""

    def read(self, keys: Keys, model: Tree) -> None:
        groups = 2 * keys.take("num_key_value_heads")
        if keys.take("swa_num_key_value_heads", groups) != groups:
            raise refused("swa_num_key_value_heads", keys.take("swa_num_key_value_heads"), f"must be {groups}")
        model.set("local.num_kv_heads", groups)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        if (groups := model.get("local.num_kv_heads")) is not None:
            config["swa_num_key_value_heads"] = groups
            if model.get("attention.mask") != "causal":
                config["num_key_value_heads"] = groups // 2


@dataclass(frozen=True)
class _Window:
    """`sliding_window_size` counts the keys before a query, `sliding_window` all that it sees."""

    def read(self, keys: Keys, model: Tree) -> None:
        window, before = keys.take("sliding_window"), keys.take("sliding_window_size", None)
        model.set("local.window", window if before is None else before + 1)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        if (window := model.get("local.window")) is not None:
            config["sliding_window"] = window


MIMO_V2_FLASH = Family(
    model_type="mimo_v2_flash",
    architecture="MiMoV2FlashForCausalLM",
    slots={
        "attention": Slot(AttentionSpec, {"mask": "causal"}),
        "local": Slot(AttentionSpec, {"mask": "sliding"}, like="attention"),
        "mlp": Slot(MLPSpec),
        "moe": Slot(MoESpec),
    },
    layers=Layers(
        windows(_first_and_sixths_full),
        _FFNs(write_list=True),
        {
            "dense": ("attention", "mlp"),
            "sparse": ("attention", "moe"),
            "local_dense": ("local", "mlp"),
            "local_sparse": ("local", "moe"),
        },
    ),
    rows=(
        *(row for row in trunk() if getattr(row, "path", "") != "norm.eps"),
        Field("norm.eps", "rms_norm_eps layernorm_epsilon"),
        *heads(),
        Agrees("swa_num_attention_heads", "attention.num_heads"),
        Field("attention.head_dim", "head_dim"),
        Agrees("swa_head_dim", "attention.head_dim"),
        Field("attention.v_head_dim", "v_head_dim"),
        Agrees("swa_v_head_dim", "attention.v_head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Computed("attention.value_scale", "attention_value_scale", float, float, if_null=1.0),
        _LocalHeads(),
        Const("local.mask", "sliding"),
        _Window(),
        Const("local.sink", True),
        Only("add_swa_attention_sink_bias", True),
        Only("add_full_attention_sink_bias", False),
        RopeByType(
            {"full_attention": "attention", "sliding_attention": "local"},
            {"full_attention": "rope_theta", "sliding_attention": "swa_rope_theta"},
            fraction=True,
        ),
        Inert("attention_chunk_size"),
        *swiglu(),
        Field("moe.num_experts", "n_routed_experts num_local_experts num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "moe_intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        *sigmoid_router(scale=None),
        Computed("moe.router.route_scale", "routed_scaling_factor", float, float, if_null=1.0),
        *router_groups(),
        Only("scoring_func", "sigmoid"),
        Only("topk_method", "noaux_tc"),
        Only("n_shared_experts", None, also=(0,)),
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        Same("layers.{n}.mixer.sink", (f"{LAYER}.self_attn.attention_sink_bias", f"{LAYER}.self_attn.sinks")),
        *mlp_weights(),
        *moe_weights(),
        correction_bias("gate.e_score_correction_bias"),
    ),
    # Three blocks of multi-token prediction, which the config does not describe.
    ignored_weights=(r".*rotary_emb\.inv_freq", r"model\.mtp\..*"),
    defaults={
        "attention_bias": False,
        "attention_value_scale": 0.707,
        "first_k_dense_replace": 1,
        "head_dim": 192,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 16_384,
        "max_position_embeddings": 131_072,
        "moe_intermediate_size": 2048,
        "n_group": 1,
        "n_routed_experts": 256,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
        "partial_rotary_factor": 0.334,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5_000_000.0,
        "routed_scaling_factor": 1.0,
        "sliding_window": 129,
        "swa_rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "v_head_dim": 128,
    },
)
