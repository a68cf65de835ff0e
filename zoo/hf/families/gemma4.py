"""Gemma 4 (text), without the per-layer embeddings of its small variants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.hf.families.gemma import GELU, by_pattern
from zoo.hf.families.shared import LAYER, SANDWICH, attention_weights, ends_weights, norm_weights
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys
from zoo.hf.layers import Layers, windows
from zoo.hf.rope import RopeByType
from zoo.hf.rows import Const, Field, Inert, Only, Row, Tree, trunk
from zoo.hf.weights import Same, WeightRow
from zoo.hf.wrapped import LAYOUTS, OTHER_WEIGHTS
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.parallel import ParallelSpec


@dataclass(frozen=True)
class _Heads:
    """Layers that see all have heads of their own width, and their own number of keys where those are values too."""

    def read(self, keys: Keys, model: Tree) -> None:
        width, groups = keys.take("head_dim"), keys.take("num_key_value_heads")
        shared, own_groups = keys.take("attention_k_eq_v"), keys.take("num_global_key_value_heads")
        own_groups = own_groups if shared else None
        by_layer = keys.take("per_layer_config", None)
        model.set("local.head_dim", width)
        model.set("local.num_kv_heads", groups)
        own = next(iter(by_layer.values())) if by_layer else {}
        model.set("attention.head_dim", own.get("head_dim") or keys.take("global_head_dim"))
        model.set("attention.num_kv_heads", own.get("num_key_value_heads") or own_groups or groups)
        model.set("attention.shared_kv", shared)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        full, local = model.get("attention") or {}, model.get("local") or model.get("attention")
        config |= {"head_dim": local["head_dim"], "num_key_value_heads": local["num_kv_heads"]}
        config["attention_k_eq_v"] = bool(full.get("shared_kv"))
        config["global_head_dim"] = full.get("head_dim")
        config["num_global_key_value_heads"] = full.get("num_kv_heads") if full.get("shared_kv") else None


@dataclass(frozen=True)
class _FFNs:
    """All layers are dense, or all have a dense and a routed mixer side by side."""

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        return ["parallel" if keys.take("enable_moe_block") else "mlp"] * num_layers

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        config["enable_moe_block"] = "parallel" in chosen


@dataclass(frozen=True)
class _LastSeesAll:
    """`layer_types`, whose last layer sees all whatever it says."""

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        return [*windows(by_pattern).read(keys, num_layers)[:-1], "attention"]

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        windows(by_pattern).write(chosen, config)


def _rows() -> Iterator[Row]:
    yield from trunk()
    yield Const("norm.weight", "fp32")
    yield Const("norm_placement", "sandwich")
    yield Const("layer_scale", True)
    yield Const("embedding.scale", "sqrt_d_model")
    yield Field("head.softcap", "final_logit_softcapping")
    yield Field("attention.num_heads", "num_attention_heads")
    yield Field("local.num_heads", "num_attention_heads")
    yield _Heads()
    for slot in ("attention", "local"):
        yield Field(f"{slot}.qkv_bias", "attention_bias")
        yield Field(f"{slot}.out_bias", "attention_bias")
        yield Const(f"{slot}.qk_norm", "head")
        yield Const(f"{slot}.v_norm", True)
        yield Const(f"{slot}.scale", 1.0)
    yield Const("local.mask", "sliding")
    yield Field("local.window", "sliding_window")
    yield RopeByType({"full_attention": "attention", "sliding_attention": "local"})
    for slot in ("mlp", "parallel.dense"):
        yield Field(f"{slot}.d_ffn", "intermediate_size")
        yield Field(f"{slot}.activation", "hidden_activation", GELU)
    yield Const("parallel.dense.type", "mlp")
    yield Const("parallel.moe.type", "moe")
    yield Field("parallel.moe.num_experts", "num_experts")
    yield Field("parallel.moe.top_k", "top_k_experts")
    yield Field("parallel.moe.d_expert", "moe_intermediate_size expert_intermediate_size")
    yield Field("parallel.moe.activation", "hidden_activation", GELU)
    yield Const("parallel.moe.router.type", "top_k")
    yield Const("parallel.moe.router.expert_scale", True)
    yield Const("parallel.moe.router.input_norm", True)
    # Text alone is causal.
    yield Only("use_bidirectional_attention", None, also=("vision", False))
    yield Only("hidden_size_per_layer_input", 0, written=True)
    yield Only("num_kv_shared_layers", 0)
    yield Only("use_double_wide_mlp", False)
    yield Only("attention_dropout", 0.0)
    yield Inert("vocab_size_per_layer_input")


def _weights() -> Iterator[WeightRow]:
    yield from ends_weights()
    yield from norm_weights(SANDWICH)
    yield from attention_weights()
    yield Same("layers.{n}.scale", (f"{LAYER}.layer_scalar",))
    for part in ("gate", "up", "down"):
        for ours in ("ffn", "ffn.dense"):
            yield Same(f"layers.{{n}}.{ours}.{part}.weight", (f"{LAYER}.mlp.{part}_proj.weight",))
    yield from norm_weights(
        {
            "ffn.dense_norm": "pre_feedforward_layernorm",
            "ffn.dense_post_norm": "post_feedforward_layernorm_1",
            "ffn.moe_norm": "pre_feedforward_layernorm_2",
            "ffn.moe_post_norm": "post_feedforward_layernorm_2",
        }
    )
    router = {"weight": "proj.weight", "input_scale": "scale", "expert_scale": "per_expert_scale"}
    for ours, theirs in router.items():
        yield Same(f"layers.{{n}}.ffn.moe.router.{ours}", (f"{LAYER}.router.{theirs}",))
    for ours, theirs in {"gate_up": "gate_up_proj", "down": "down_proj"}.items():
        yield Same(f"layers.{{n}}.ffn.moe.experts.{ours}", (f"{LAYER}.experts.{theirs}",))


GEMMA4_TEXT = Family(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    layouts=LAYOUTS,
    ignored_weights=OTHER_WEIGHTS,
    slots={
        "attention": Slot(AttentionSpec, {"mask": "causal"}),
        "local": Slot(AttentionSpec, {"mask": "sliding"}),
        "mlp": Slot(MLPSpec),
        "parallel": Slot(ParallelSpec),
    },
    layers=Layers(
        _LastSeesAll(),
        _FFNs(),
        {
            "full": ("attention", "mlp"),
            "local": ("local", "mlp"),
            "full_sparse": ("attention", "parallel"),
            "local_sparse": ("local", "parallel"),
        },
        options={name: {"ffn_placement": "post"} for name in ("full_sparse", "local_sparse")},
    ),
    rows=tuple(_rows()),
    weights=tuple(_weights()),
    defaults={
        "attention_bias": False,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "final_logit_softcapping": None,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
        "intermediate_size": 9216,
        "max_position_embeddings": 131_072,
        "moe_intermediate_size": None,
        "num_experts": None,
        "num_global_key_value_heads": None,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
        },
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "top_k_experts": None,
    },
)
