"""Qwen3-Next and Qwen3.5: three layers of the gated delta rule, then one of gated attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from zoo.hf.families.shared import LAYER, mlp_weights, moe_weights, shared_expert_weights, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys
from zoo.hf.layers import Always, Layers, Listed, SparseSteps
from zoo.hf.mtp import MTP, QWEN_NAMES, MTPNames
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, Inert, Only, Row, SharedWidth, heads, swiglu, trunk
from zoo.hf.weights import Fused, JointRow, Same, WeightRow
from zoo.hf.wrapped import LAYOUTS, OTHER_WEIGHTS
from zoo.spec.attention import AttentionSpec
from zoo.spec.delta import DeltaSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

_OURS = "layers.{n}.mixer"


def linear_layers(every: str | None = "full_attention_interval") -> Listed:
    """`layer_types` of linear and full attention; without it, every so manieth layer is full."""

    def rule(keys: Keys, num_layers: int) -> list[str]:
        interval = keys.integer(every, 1, 1_000_000) if every else 4
        return ["delta" if (layer + 1) % interval else "attention" for layer in range(num_layers)]

    return Listed("layer_types", {"linear_attention": "delta", "full_attention": "attention"}, rule)


def delta_rows() -> Iterator[Row]:
    """The gated delta rule with a decay for each head."""
    yield Field("delta.num_heads", "linear_num_value_heads")
    yield Field("delta.num_qk_heads", "linear_num_key_heads")
    yield Field("delta.head_dim", "linear_key_head_dim")
    yield Field("delta.v_head_dim", "linear_value_head_dim")
    yield Field("delta.conv_width", "linear_conv_kernel_dim")


def gated_attention_weights(spec: AttentionSpec) -> Iterator[WeightRow | JointRow]:
    """Each head's rows for its queries, then those for its gate."""
    theirs = f"{LAYER}.self_attn"
    q, gate = (f"{_OURS}.{part}.weight" for part in ("q", "gate"))
    yield Fused((q, gate), f"{theirs}.q_proj.weight", groups=spec.num_heads)
    for ours, name in {"k": "k_proj", "v": "v_proj", "out": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm"}.items():
        yield Same(f"{_OURS}.{ours}.weight", (f"{theirs}.{name}.weight",))


def _delta_weights() -> Iterator[WeightRow | JointRow]:
    theirs = f"{LAYER}.linear_attn"
    for ours, name in {"conv": "conv1d", "norm": "norm", "out": "out_proj"}.items():
        yield Same(f"{_OURS}.{ours}.weight", (f"{theirs}.{name}.weight",))
    yield Same(f"{_OURS}.a_log", (f"{theirs}.A_log",))
    yield Same(f"{_OURS}.dt_bias", (f"{theirs}.dt_bias",))


def grouped_delta_weights(spec: DeltaSpec) -> Iterator[WeightRow | JointRow]:
    """All projections stored as two, key head by key head."""
    for parts, name in ((("q", "k", "v", "gate"), "in_proj_qkvz"), (("beta", "decay"), "in_proj_ba")):
        members = tuple(f"{_OURS}.{part}.weight" for part in parts)
        yield Fused(members, f"{LAYER}.linear_attn.{name}.weight", groups=spec.qk_heads)
    yield from _delta_weights()


def separate_delta_weights(spec: DeltaSpec) -> Iterator[WeightRow | JointRow]:
    """Queries, keys and values stored as one."""
    members = tuple(f"{_OURS}.{part}.weight" for part in ("q", "k", "v"))
    yield Fused(members, f"{LAYER}.linear_attn.in_proj_qkv.weight")
    for ours, name in {"gate": "in_proj_z", "beta": "in_proj_b", "decay": "in_proj_a"}.items():
        yield Same(f"{_OURS}.{ours}.weight", (f"{LAYER}.linear_attn.{name}.weight",))
    yield from _delta_weights()


def _expert_weights() -> Iterator[WeightRow]:
    yield from moe_weights()
    yield from shared_expert_weights("shared_expert")
    yield Same("layers.{n}.ffn.shared_gate.weight", (f"{LAYER}.mlp.shared_expert_gate.weight",))


def _trunk_rows() -> Iterator[Row]:
    yield from trunk()
    yield Const("norm.weight", "plus_one")
    yield from heads()
    yield Field("attention.head_dim", "head_dim")
    yield Const("attention.qk_norm", "head")
    yield Const("attention.gate", "element")
    yield Only("attention_bias", False)
    yield Only("attn_output_gate", True)
    yield Rope(fraction=True, without_effect=("mrope_interleaved", "mrope_section"))  # of images alone
    yield from delta_rows()
    yield Only("hidden_act", "silu")
    yield Inert("full_attention_interval")
    yield Inert("mamba_ssm_dtype")


def _expert_rows() -> Iterator[Row]:
    yield Field("moe.num_experts", "num_experts num_local_experts")
    yield Field("moe.top_k", "num_experts_per_tok")
    yield Field("moe.d_expert", "moe_intermediate_size")
    yield SharedWidth("moe", "shared_expert_intermediate_size")
    yield Const("moe.shared_gate", True)
    yield Field("moe.activation", "hidden_act", ACTIVATIONS)
    yield Field("moe.router.normalize", "norm_topk_prob")
    yield Field("moe.balance.aux_loss", "router_aux_loss_coef")
    yield Const("moe.router.type", "top_k")


_DEFAULTS: dict[str, Any] = {
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_EXPERT_DEFAULTS = {
    "decoder_sparse_step": 1,
    "intermediate_size": 5632,
    "mlp_only_layers": None,
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
}
_MTP_NAMES = MTPNames(QWEN_NAMES, blocks="mtp.")
_ATTENTION = Slot(AttentionSpec, weights=gated_attention_weights)

QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    slots={
        "attention": _ATTENTION,
        "delta": Slot(DeltaSpec, weights=grouped_delta_weights),
        "mlp": Slot(MLPSpec),
        "moe": Slot(MoESpec),
    },
    layers=Layers(
        linear_layers(),
        SparseSteps(),
        {
            "linear": ("delta", "moe"),
            "full": ("attention", "moe"),
            "linear_dense": ("delta", "mlp"),
            "full_dense": ("attention", "mlp"),
        },
    ),
    # The release has a block of multi-token prediction of which its config says nothing.
    rows=(*_trunk_rows(), *swiglu(), *_expert_rows(), MTP("full", absent=1)),
    weights=(*trunk_weights(), *mlp_weights(), *_expert_weights()),
    mtp=_MTP_NAMES,
    defaults={**_DEFAULTS, **_EXPERT_DEFAULTS},
)

QWEN3_5 = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    slots={
        "attention": _ATTENTION,
        "delta": Slot(DeltaSpec, weights=separate_delta_weights),
        "mlp": Slot(MLPSpec),
    },
    layers=Layers(linear_layers(), Always("mlp"), {"linear": ("delta", "mlp"), "full": ("attention", "mlp")}),
    rows=(
        *_trunk_rows(),
        *swiglu(),
        MTP("full", key="mtp_num_hidden_layers"),
        Only("mtp_use_dedicated_embeddings", False),
        Only("mlp_only_layers", []),
    ),
    weights=(*trunk_weights(), *mlp_weights()),
    layouts=LAYOUTS,
    ignored_weights=OTHER_WEIGHTS,
    mtp=_MTP_NAMES,
    defaults={**_DEFAULTS, "intermediate_size": 12_288, "num_key_value_heads": 4},
)

QWEN3_5_MOE = replace(
    QWEN3_5,
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    slots={**QWEN3_5.slots, "moe": Slot(MoESpec)},
    layers=Layers(linear_layers(), Always("moe"), {"linear": ("delta", "moe"), "full": ("attention", "moe")}),
    rows=(
        *_trunk_rows(),
        *_expert_rows(),
        MTP("full", key="mtp_num_hidden_layers"),
        Only("mtp_use_dedicated_embeddings", False),
        Only("mlp_only_layers", []),
        Inert("intermediate_size"),
    ),
    weights=(*trunk_weights(), *_expert_weights()),
    defaults={**_DEFAULTS, **_EXPERT_DEFAULTS, "num_experts": 256, "num_experts_per_tok": 8},
)
