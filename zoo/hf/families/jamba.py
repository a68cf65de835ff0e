"""Jamba: Mamba-1 with an attention and experts now and then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.hf.families.shared import (
    LAYER,
    attention_weights,
    feed_forward_weights,
    trunk_weights,
)
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys, refused
from zoo.hf.layers import Layers
from zoo.hf.rows import Const, Field, Inert, Only, Tree, heads, swiglu, trunk
from zoo.hf.weights import Fused, JointRow, Same, WeightRow
from zoo.spec.attention import AttentionSpec
from zoo.spec.mamba1 import Mamba1Spec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

_OURS = "layers.{n}.mixer"


@dataclass(frozen=True)
class Periodic:
    """Of every so many layers, one that uses another slot."""

    name: str
    """What the keys for the period and the offset of that one begin with."""
    rare: str
    common: str
    unless: str | None = None
    """A key that must be above 1 for any layer to use it."""

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        period, offset = (keys.integer(f"{self.name}_layer_{part}", 0, 1_000_000) for part in ("period", "offset"))
        if offset >= period:
            raise refused(f"{self.name}_layer_offset", offset, f"must be below {self.name}_layer_period ({period})")
        none = self.unless is not None and keys.integer(self.unless, 0, 1_000_000) <= 1
        return [self.rare if layer % period == offset and not none else self.common for layer in range(num_layers)]

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        places = [layer for layer, slot in enumerate(chosen) if slot == self.rare]
        first = places[0] if places else len(chosen)
        period = places[1] - places[0] if len(places) > 1 else len(chosen) + 1
        config[f"{self.name}_layer_period"], config[f"{self.name}_layer_offset"] = period, first
        if self.unless is not None and not places:
            config[self.unless] = 1


def _mamba1_weights(spec: Mamba1Spec) -> Iterator[WeightRow | JointRow]:
    theirs = f"{LAYER}.mamba"
    for kind in ("weight", "bias"):
        yield Fused((f"{_OURS}.x.{kind}", f"{_OURS}.z.{kind}"), f"{theirs}.in_proj.{kind}")
        yield Same(f"{_OURS}.conv.{kind}", (f"{theirs}.conv1d.{kind}",))
        yield Same(f"{_OURS}.out.{kind}", (f"{theirs}.out_proj.{kind}",))
    yield Fused(tuple(f"{_OURS}.{part}.weight" for part in ("dt_down", "b", "c")), f"{theirs}.x_proj.weight")
    for part in ("b", "c", "dt"):
        yield Same(f"{_OURS}.{part}_norm.weight", (f"{theirs}.{part}_layernorm.weight",))
    for ours, name in {"dt.weight": "dt_proj.weight", "dt_bias": "dt_proj.bias", "a_log": "A_log", "skip": "D"}.items():
        yield Same(f"{_OURS}.{ours}", (f"{theirs}.{name}",))


class InnerWidth:
    """Channels of Mamba-1, in proportion to the model's, and the rank of its steps."""

    def read(self, keys: Keys, model: Tree) -> None:
        hidden, rank = keys.take("hidden_size"), keys.take("mamba_dt_rank")
        model.set("mamba.d_inner", keys.take("mamba_expand") * hidden)
        model.set("mamba.dt_rank", -(-hidden // 16) if rank == "auto" else rank)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        if model.has("mamba"):
            config["mamba_expand"] = model.get("mamba.d_inner") // config["hidden_size"]
            config["mamba_dt_rank"] = model.get("mamba.dt_rank")


JAMBA = Family(
    model_type="jamba",
    architecture="JambaForCausalLM",
    slots={
        "mamba": Slot(Mamba1Spec, weights=_mamba1_weights),
        "attention": Slot(AttentionSpec),
        "mlp": Slot(MLPSpec),
        "moe": Slot(MoESpec),
    },
    layers=Layers(
        Periodic("attn", "attention", "mamba"),
        Periodic("expert", "moe", "mlp", unless="num_experts"),
        {
            "mamba": ("mamba", "mlp"),
            "mamba_sparse": ("mamba", "moe"),
            "attention": ("attention", "mlp"),
            "attention_sparse": ("attention", "moe"),
        },
    ),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Const("attention.rope", None),
        InnerWidth(),
        Field("mamba.d_state", "mamba_d_state"),
        Field("mamba.conv_width", "mamba_d_conv"),
        Field("mamba.conv_bias", "mamba_conv_bias"),
        Field("mamba.bias", "mamba_proj_bias"),
        Const("mamba.inner_norms", True),
        *swiglu(),
        Only("hidden_act", "silu"),
        Field("moe.d_expert", "intermediate_size"),
        Field("moe.num_experts", "num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Const("moe.router.type", "top_k"),
        Const("moe.router.normalize", False),
        Field("moe.balance.aux_loss", "router_aux_loss_coef"),
        *map(Inert, ("mamba_inner_layernorms", "num_logits_to_keep", "sliding_window")),
        *map(Inert, ("use_associative_scan", "use_mamba_kernels", "use_mambapy")),
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        *feed_forward_weights({"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}, "router"),
        Same("norm.weight", ("model.final_layernorm.weight",)),
        Same("layers.{n}.ffn_norm.weight", (f"{LAYER}.pre_ff_layernorm.weight",)),
    ),
    defaults={
        "attn_layer_offset": 4,
        "attn_layer_period": 8,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 14_336,
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_dt_rank": "auto",
        "mamba_expand": 2,
        "mamba_proj_bias": False,
        "max_position_embeddings": 262_144,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    },
)
