"""Granite 4: state-space layers with an attention without positions now and then, dense or mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from zoo.hf.families.nemotron import StepBounds, mamba2_weights
from zoo.hf.families.shared import LAYER, attention_weights, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys, refused
from zoo.hf.layers import Layers, Listed
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, Only, SharedWidth, Tree, heads, inverse, multiplier, trunk
from zoo.hf.weights import Fused, JointRow, Same, WeightRow
from zoo.spec.attention import AttentionSpec
from zoo.spec.mamba2 import Mamba2Spec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

_MOE = f"{LAYER}.block_sparse_moe"


def _all_mamba(keys: Keys, num_layers: int) -> list[str]:
    return ["mamba"] * num_layers


_TYPES = {"linear_attention": "mamba", "full_attention": "attention", "mamba": "mamba", "attention": "attention"}


@dataclass(frozen=True)
class ByNumber:
    """All layers are sparse, or with no experts at all they are dense."""

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        return ["moe" if keys.take("num_local_experts") else "mlp"] * num_layers

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        if "mlp" in chosen:
            config |= {"num_local_experts": 0, "num_experts_per_tok": 0}
            config["intermediate_size"] = config["shared_intermediate_size"]


@dataclass(frozen=True)
class SharedMLP:
    """The MLP of dense layers and the shared experts of sparse ones go by the same key."""

    key: str = "shared_intermediate_size"

    def read(self, keys: Keys, model: Tree) -> None:
        model.set("mlp.d_ffn", keys.take(self.key))
        SharedWidth("moe", self.key).read(keys, model)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        if model.has("mlp"):
            config[self.key] = model.get("mlp.d_ffn")
        SharedWidth("moe", self.key).write(model, config)


@dataclass(frozen=True)
class MaybeRope(Rope):
    """Rotary positions if `position_embedding_type` says so."""

    def read(self, keys: Keys, model: Tree) -> None:
        kind = keys.take("position_embedding_type", None)
        if kind not in (None, "nope", "rope"):
            raise refused("position_embedding_type", kind, "understood: 'rope', 'nope', None")
        super().read(keys, model)
        if kind != "rope":
            model.set(f"{self.slot}.rope", None)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        turned = model.get(f"{self.slot}.rope") is not None
        config["position_embedding_type"] = "rope" if turned else "nope"
        if turned:
            super().write(model, config)


@dataclass(frozen=True)
class Expansion:
    """Width of the state-space layers: `mamba_expand` times the model's, which heads must add up to."""

    def read(self, keys: Keys, model: Tree) -> None:
        width, num_heads = keys.take("mamba_expand") * keys.take("hidden_size"), keys.take("mamba_n_heads")
        head_dim = keys.take("mamba_d_head")
        head_dim = width // num_heads if head_dim == "auto" else head_dim
        if head_dim * num_heads != width:
            raise refused("mamba_d_head", head_dim, f"must be mamba_expand * hidden_size / mamba_n_heads of {width}")
        model.set("mamba.num_heads", num_heads)
        model.set("mamba.head_dim", head_dim)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        if model.has("mamba"):
            config["mamba_n_heads"], config["mamba_d_head"] = model.get("mamba.num_heads"), model.get("mamba.head_dim")
            config["mamba_expand"] = config["mamba_n_heads"] * config["mamba_d_head"] // config["hidden_size"]


def _weights() -> Iterator[WeightRow | JointRow]:
    yield from trunk_weights()
    yield from attention_weights()
    for ours in ("layers.{n}.ffn", "layers.{n}.ffn.shared"):
        yield Fused((f"{ours}.gate.weight", f"{ours}.up.weight"), f"{LAYER}.shared_mlp.input_linear.weight")
        yield Same(f"{ours}.down.weight", (f"{LAYER}.shared_mlp.output_linear.weight",))
    yield Same("layers.{n}.ffn.router.weight", (f"{_MOE}.router.layer.weight", f"{_MOE}.router.weight"))
    yield Same("layers.{n}.ffn.experts.gate_up", (f"{_MOE}.input_linear.weight", f"{_MOE}.experts.gate_up_proj"))
    yield Same("layers.{n}.ffn.experts.down", (f"{_MOE}.output_linear.weight", f"{_MOE}.experts.down_proj"))


GRANITE_HYBRID = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    slots={
        "mamba": Slot(Mamba2Spec, weights=partial(mamba2_weights, mixer=f"{LAYER}.mamba")),
        "attention": Slot(AttentionSpec),
        "mlp": Slot(MLPSpec),
        "moe": Slot(MoESpec),
    },
    layers=Layers(
        Listed("layer_types", _TYPES, _all_mamba),
        ByNumber(),
        {
            "mamba": ("mamba", "moe"),
            "attention": ("attention", "moe"),
            "mamba_dense": ("mamba", "mlp"),
            "attention_dense": ("attention", "mlp"),
        },
    ),
    rows=(
        *trunk(),
        multiplier("embedding.scale", "embedding_multiplier"),
        Field("residual_scale", "residual_multiplier"),
        inverse("head.scale", "logits_scaling"),
        Only("normalization_function", "rmsnorm"),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.scale", "attention_multiplier"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        MaybeRope(),
        Expansion(),
        Field("mamba.num_groups", "mamba_n_groups"),
        Field("mamba.d_state", "mamba_d_state"),
        Field("mamba.conv_width", "mamba_d_conv"),
        Field("mamba.conv_bias", "mamba_conv_bias"),
        Field("mamba.bias", "mamba_proj_bias"),
        Field("mamba.chunk_size", "mamba_chunk_size"),
        StepBounds(by_minimum=False),
        Field("moe.num_experts", "num_local_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "intermediate_size"),
        SharedMLP(),
        Field("mlp.activation", "hidden_act", ACTIVATIONS),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        Const("moe.router.type", "top_k"),
        Const("moe.router.score_chosen", True),
        Const("moe.router.normalize", False),
        Field("moe.balance.aux_loss", "router_aux_loss_coef"),
    ),
    weights=tuple(_weights()),
    defaults={
        "attention_bias": False,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 11_008,
        "logits_scaling": 1.0,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_d_head": "auto",
        "mamba_d_state": 256,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_n_heads": 128,
        "mamba_proj_bias": False,
        "max_position_embeddings": 2048,
        "num_experts_per_tok": 2,
        "num_key_value_heads": None,
        "num_local_experts": 8,
        "residual_multiplier": 1.0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "router_aux_loss_coef": 0.001,
        "shared_intermediate_size": 1024,
        "tie_word_embeddings": False,
    },
)
