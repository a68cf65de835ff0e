"""ERNIE 4.5, dense and mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.hf.families.shared import (
    LAYER,
    attention_weights,
    mlp_weights,
    moe_weights,
    shared_expert_weights,
    trunk_weights,
)
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys
from zoo.hf.layers import Always, Layers
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, Only, Row, heads, swiglu, trunk
from zoo.hf.weights import Led
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

_DEFAULTS = {
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
    "use_bias": False,
}


def _rows() -> Iterator[Row]:
    yield from trunk()
    yield from heads()
    yield Field("attention.head_dim", "head_dim")
    yield Field("attention.qkv_bias", "use_bias")
    yield Field("attention.out_bias", "use_bias")
    yield Rope()
    yield Const("attention.rope.layout", "interleaved")
    yield Const("attention.rope.arithmetic", "fp32")
    yield from swiglu()
    yield Field("mlp.bias", "use_bias")


ERNIE4_5 = Family(
    model_type="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    slots={"attention": Slot(AttentionSpec), "mlp": Slot(MLPSpec)},
    layers=Layers(Always("attention"), Always("mlp"), {"dense": ("attention", "mlp")}),
    rows=tuple(_rows()),
    weights=(*trunk_weights(), *attention_weights(), *mlp_weights()),
    defaults={**_DEFAULTS, "head_dim": 128, "num_key_value_heads": 2},
)


@dataclass(frozen=True)
class _SparseRange:
    """Every `moe_layer_interval`-th layer from `moe_layer_start_index` to `moe_layer_end_index` is sparse."""

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        start = keys.integer("moe_layer_start_index", 0, 1_000_000)
        end = keys.integer("moe_layer_end_index", -1, 1_000_000)
        step = keys.integer("moe_layer_interval", 1, 1_000_000)
        sparse = range(start, (num_layers - 1 if end == -1 else end) + 1)
        return ["moe" if layer in sparse and (layer + 1) % step == 0 else "mlp" for layer in range(num_layers)]

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        sparse = [layer for layer, slot in enumerate(chosen) if slot == "moe"]
        start, end = (sparse[0], sparse[-1]) if sparse else (len(chosen), len(chosen))
        step = sparse[1] - sparse[0] if len(sparse) > 1 else 1
        config |= {"moe_layer_start_index": start, "moe_layer_end_index": end, "moe_layer_interval": step}


ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    slots={"attention": Slot(AttentionSpec), "mlp": Slot(MLPSpec), "moe": Slot(MoESpec)},
    layers=Layers(Always("attention"), _SparseRange(), {"dense": ("attention", "mlp"), "sparse": ("attention", "moe")}),
    rows=(
        *_rows(),
        Only("use_bias", False),  # the shared experts would have biases and the routed ones none
        Only("mlp_layer_types", None),
        Field("moe.num_experts", "moe_num_experts num_experts"),
        Field("moe.top_k", "moe_k num_experts_per_tok"),
        Field("moe.d_expert", "moe_intermediate_size"),
        Field("moe.num_shared_experts", "moe_num_shared_experts"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        Const("moe.router.type", "top_k"),
        Const("moe.router.correction_bias", True),
        Const("moe.router.count_bias", True),
        Const("moe.router.arithmetic", "fp32"),
        Only("moe_norm_min", 1e-12),  # the best of the softmax's shares are never so few
        Field("moe.balance.aux_loss", "router_aux_loss_coef"),
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        *mlp_weights(),
        *moe_weights(),
        *shared_expert_weights(),
        Led(
            "layers.{n}.ffn.router.correction_bias",
            tuple(f"{LAYER}.mlp.{place}moe_statics.e_score_correction_bias" for place in ("", "gate.")),
        ),
    ),
    defaults={
        **_DEFAULTS,
        "intermediate_size": 12_288,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "num_key_value_heads": 4,
        "router_aux_loss_coef": 0.001,
    },
)
