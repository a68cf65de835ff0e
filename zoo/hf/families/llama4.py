"""Llama 4 (text)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.hf.families.shared import LAYER, attention_weights, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys, refused
from zoo.hf.layers import Layers, Listed
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, Inert, Only, SameAs, Tree, heads, trunk
from zoo.hf.weights import Same, Transposed, WeightRow
from zoo.hf.wrapped import LAYOUTS, OTHER_WEIGHTS
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

# Layers by two properties: chunks or all keys, rotary positions or none.
_SLOTS: dict[str, dict[str, Any]] = {
    "attention": {"mask": "causal", "rope": None},
    "local": {"mask": "chunked", "rope.layout": "interleaved"},
    "full": {"mask": "causal", "rope.layout": "interleaved"},
    "local_nope": {"mask": "chunked", "rope": None},
}
_ROTARY, _NOPE = ("local", "full"), ("attention", "local_nope")


class _Mixers(Listed):
    """`no_rope_layers` holds 1 where positions are rotary; `layer_types` says `chunked_attention` for chunks."""

    def __init__(self) -> None:
        super().__init__(
            "layer_types", {"full_attention": "causal", "chunked_attention": "chunked"}, _chunked_if_rotary
        )

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        rotary = _rotary(keys, num_layers)
        names = {
            ("causal", False): "attention",
            ("chunked", True): "local",
            ("causal", True): "full",
            ("chunked", False): "local_nope",
        }
        return [names[pair] for pair in zip(super().read(keys, num_layers), rotary, strict=True)]

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        config["no_rope_layers"] = [int(slot in _ROTARY) for slot in chosen]
        chunked = ("local", "local_nope")
        config["layer_types"] = ["chunked_attention" if slot in chunked else "full_attention" for slot in chosen]


def _rotary(keys: Keys, num_layers: int) -> list[bool]:
    """Which layers have rotary positions; by default all but every `no_rope_layer_interval`-th."""
    listed = keys.take("no_rope_layers", None)
    step = keys.integer("no_rope_layer_interval", 1, 1_000_000)
    if not listed:
        return [(layer + 1) % step != 0 for layer in range(num_layers)]
    if not isinstance(listed, list) or len(listed) < num_layers:
        raise refused("no_rope_layers", listed, f"must be a list of {num_layers} numbers 0 or 1, one for each layer")
    return [bool(flag) for flag in listed[:num_layers]]


def _chunked_if_rotary(keys: Keys, num_layers: int) -> list[str]:
    return ["chunked" if rotary else "causal" for rotary in _rotary(keys, num_layers)]


@dataclass(frozen=True)
class _SparseLayers:
    """`moe_layers` lists the sparse layers; by default every `interleave_moe_layer_step`-th."""

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        step = keys.integer("interleave_moe_layer_step", 1, 1_000_000)
        listed = keys.take("moe_layers", None)
        sparse = set(range(step - 1, num_layers, step) if listed is None else listed)
        return ["moe" if layer in sparse else "mlp" for layer in range(num_layers)]

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        config["moe_layers"] = sparse = [layer for layer, slot in enumerate(chosen) if slot == "moe"]
        step = sparse[0] + 1 if sparse else 1
        if sparse == list(range(step - 1, len(chosen), step)):
            config["interleave_moe_layer_step"] = step


@dataclass(frozen=True)
class _Temperature:
    """Queries of layers without positions grow with their position if `attn_temperature_tuning` is true."""

    def read(self, keys: Keys, model: Tree) -> None:
        scale = {"beta": keys.take("attn_scale"), "original_context": keys.take("floor_scale"), "shift": 1}
        tuned = bool(keys.take("attn_temperature_tuning"))
        for slot in _NOPE:
            model.set(f"{slot}.query_scale", scale if tuned else None)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        scale = model.get("attention.query_scale") or model.get("local_nope.query_scale")
        config["attn_temperature_tuning"] = scale is not None
        if scale is not None:
            config |= {"attn_scale": scale["beta"], "floor_scale": scale["original_context"]}


@dataclass(frozen=True)
class _Rope(Rope):
    """One rotary embedding, in the layers that have one."""

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        if model.get("local.rope") is None:
            model = Tree({**model.data, "local": model.data.get("full", {})})
        super().write(model, config)


def _ffn_weights() -> Iterator[WeightRow]:
    ffn, theirs = "layers.{n}.ffn", f"{LAYER}.feed_forward"
    for part in ("gate", "up", "down"):
        yield Same(f"{ffn}.{part}.weight", (f"{theirs}.{part}_proj.weight",))
        yield Same(f"{ffn}.shared.{part}.weight", (f"{theirs}.shared_expert.{part}_proj.weight",))
    yield Same(f"{ffn}.router.weight", (f"{theirs}.router.weight",))
    yield Transposed(f"{ffn}.experts.gate_up", f"{theirs}.experts.gate_up_proj")
    yield Transposed(f"{ffn}.experts.down", f"{theirs}.experts.down_proj")


LLAMA4_TEXT = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    layouts=LAYOUTS,
    ignored_weights=OTHER_WEIGHTS,
    slots={
        **{name: Slot(AttentionSpec, when, like="attention") for name, when in _SLOTS.items()},
        "mlp": Slot(MLPSpec),
        "moe": Slot(MoESpec),
    },
    layers=Layers(
        _Mixers(),
        _SparseLayers(),
        {
            f"{prefix}{kind}": (mixer, ffn)
            for mixer, prefix in (("attention", ""), ("local", "local_"), ("full", "full_"), ("local_nope", "nope_"))
            for kind, ffn in (("dense", "mlp"), ("sparse", "moe"))
        },
    ),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        *(Const(f"{slot}.rope", None) for slot in _NOPE),
        _Rope("local"),
        Const("local.rope.layout", "interleaved"),
        Const("local.rope.arithmetic", "complex"),
        SameAs("full.rope", "local.rope"),
        *(Const(f"{slot}.mask", "chunked") for slot in ("local", "local_nope")),
        *(Field(f"{slot}.window", "attention_chunk_size") for slot in ("local", "local_nope")),
        *(Field(f"{slot}.qk_norm", "use_qk_norm", {True: "head", False: "none"}) for slot in _ROTARY),
        *(Field(f"{slot}.qk_norm_weight", "use_qk_norm", {True: "none", False: "model"}) for slot in _ROTARY),
        *(Field(f"{slot}.qk_norm_after_rope", "use_qk_norm") for slot in _ROTARY),
        *(Const(f"{slot}.query_scale", None) for slot in _ROTARY),
        _Temperature(),
        Field("mlp.d_ffn", "intermediate_size_mlp"),
        Field("mlp.activation", "hidden_act", ACTIVATIONS),
        Field("moe.num_experts", "num_local_experts num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        Const("moe.num_shared_experts", 1),
        Const("moe.router.type", "top_k"),
        Const("moe.router.score", "sigmoid"),
        Const("moe.router.normalize", False),
        Const("moe.router.weigh", "input"),
        Field("moe.balance.aux_loss", "router_aux_loss_coef"),
        Only("router_jitter_noise", 0.0),
        Inert("for_llm_compressor"),
    ),
    weights=(*trunk_weights(), *attention_weights(), *_ffn_weights()),
    defaults={
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 16_384,
        "max_position_embeddings": 131_072,
        "no_rope_layer_interval": 4,
        "num_experts_per_tok": 1,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
        "use_qk_norm": True,
    },
)
