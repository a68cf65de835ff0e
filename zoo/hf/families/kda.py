"""Kimi Linear and Ling 3: Kimi delta attention with a layer of latent attention now and then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from zoo.hf.families.latent import latent_rows, latent_weights
from zoo.hf.families.shared import (
    LAYER,
    block_sparse_moe_weights,
    correction_bias,
    mlp_weights,
    moe_weights,
    shared_expert_weights,
    sigmoid_router,
    trunk_weights,
)
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys, refused
from zoo.hf.layers import FirstDense, Layers, Listed
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, Inert, Only, Row, SameAs, Tree, Twofold, swiglu, trunk
from zoo.hf.weights import Same, Shaped, Split, WeightRow
from zoo.spec.delta import DeltaSpec
from zoo.spec.mla import MLASpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

_OURS = "layers.{n}.mixer"
_TYPES = {"linear_attention": "delta", "full_attention": "attention"}
_KINDS = {
    "linear_dense": ("delta", "mlp"),
    "linear": ("delta", "moe"),
    "full_dense": ("attention", "mlp"),
    "full": ("attention", "moe"),
}


_FORGET_GATE = {
    ".A_log": ".forget_gate.A_log",
    ".f_proj.": ".forget_gate.f_proj.",
    ".f_a_proj.": ".forget_gate.f_a_proj.",
    ".f_b_proj.": ".forget_gate.f_b_proj.",
    ".dt_bias": ".forget_gate.dt_bias",
}
"""Names inside of others: on the hub, and in the memory of transformers."""


def kda_weights(spec: DeltaSpec, theirs: str, names: dict[str, str], rates: tuple[int, ...]) -> Iterator[WeightRow]:
    """Kimi delta attention.

    Args:
        theirs: how stored names begin.
        names: of projections, by ours.
        rates: the shape in which `A_log` is stored.
    """
    for ours, name in {
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "beta": "b_proj",
        "norm": "o_norm",
        **names,
    }.items():
        yield Same(f"{_OURS}.{ours}.weight", (f"{theirs}.{name}.weight",))
    parts = tuple(f"{theirs}.{part}_conv1d.weight" for part in "qkv")
    widths = (spec.qk_heads * spec.head_dim, spec.qk_heads * spec.head_dim, spec.num_heads * spec.v_width)
    yield Split(f"{_OURS}.conv.weight", parts, widths, f"{theirs}.conv1d.weight")
    yield Shaped(f"{_OURS}.a_log", (f"{theirs}.A_log",), rates)
    yield Same(f"{_OURS}.dt_bias", (f"{theirs}.dt_bias",))


def _low_rank_weights(spec: DeltaSpec) -> Iterator[WeightRow]:
    names = {"decay_down": "f_a_proj", "decay": "f_b_proj", "gate_down": "g_a_proj", "gate": "g_b_proj"}
    yield from kda_weights(spec, f"{LAYER}.self_attn", {**names, "out": "o_proj"}, (1, 1, spec.num_heads, 1))


def _full_rank_weights(spec: DeltaSpec) -> Iterator[WeightRow]:
    names = {"decay": "f_proj", "gate": "g_proj", "out": "dense"}
    yield from kda_weights(spec, f"{LAYER}.attention", names, (spec.num_heads,))


def _delta_rows() -> Iterator[Row]:
    yield Const("delta.decay.per", "channel")
    yield Const("delta.gate_activation", "sigmoid")
    yield Const("delta.norm_weight", "fp32")
    yield Only("hidden_act", "silu")


def _expert_rows() -> Iterator[Row]:
    yield from swiglu()
    yield Field("moe.num_experts", "num_experts num_local_experts")
    yield Field("moe.top_k", "num_experts_per_token num_experts_per_tok")
    yield Field("moe.d_expert", "moe_intermediate_size")
    yield Field("moe.num_shared_experts", "num_shared_experts n_shared_experts")
    yield Field("moe.activation", "hidden_act", ACTIVATIONS)
    yield from sigmoid_router()
    yield Field("moe.router.normalize", "moe_renormalize norm_topk_prob")
    yield Field("moe.router.num_groups", "num_expert_group n_group")
    yield Field("moe.router.top_groups", "topk_group")
    yield Only("moe_layer_freq", 1)


class OneBased(Listed):
    """`layer_types`; without it, `linear_attn_config` lists the layers of both types, counted from 1."""

    def __init__(self) -> None:
        super().__init__("layer_types", _TYPES, _listed_layers)

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        super().write(chosen, config)
        for key, slot in (("full_attn_layers", "attention"), ("kda_layers", "delta")):
            config[f"linear_attn_config.{key}"] = [n + 1 for n, other in enumerate(chosen) if other == slot]


def _listed_layers(keys: Keys, num_layers: int) -> list[str]:
    full, linear = (keys.take(f"linear_attn_config.{key}", None) for key in ("full_attn_layers", "kda_layers"))
    if full is None and linear is None:
        return ["attention" if layer and layer % 4 == 0 else "delta" for layer in range(num_layers)]
    lists = isinstance(full, list) and isinstance(linear, list)
    if not lists or sorted([*full, *linear], key=repr) != sorted(range(1, num_layers + 1), key=repr):
        raise refused("linear_attn_config.full_attn_layers", full, "must be, with kda_layers, all layers from 1 on")
    return ["attention" if layer + 1 in full else "delta" for layer in range(num_layers)]


_SPARSE = f"{LAYER}.block_sparse_moe"


def _dense_and_shared_weights() -> Iterator[WeightRow]:
    for part in ("gate", "up", "down"):
        # transformers saves dense layers under the name of the sparse ones and opens both.
        dense = (f"{LAYER}.mlp.{part}_proj.weight", f"{_SPARSE}.{part}_proj.weight")
        yield Same(f"layers.{{n}}.ffn.{part}.weight", dense)
        yield Same(f"layers.{{n}}.ffn.shared.{part}.weight", (f"{_SPARSE}.shared_experts.{part}_proj.weight",))


KIMI_LINEAR = Family(
    model_type="kimi_linear",
    architecture="KimiLinearForCausalLM",
    slots={
        "attention": Slot(MLASpec, weights=latent_weights),
        "delta": Slot(DeltaSpec, weights=_low_rank_weights),
        "mlp": Slot(MLPSpec),
        "moe": Slot(MoESpec),
    },
    layers=Layers(OneBased(), FirstDense(write_list=True), _KINDS),
    rows=(
        *trunk(context="model_max_length max_position_embeddings"),
        *latent_rows(),
        Const("attention.rope", None),
        Only("mla_use_nope", True, written=True),
        *_delta_rows(),
        Twofold("delta.num_heads", "linear_num_heads", "linear_attn_config.num_heads"),
        Twofold("delta.head_dim", "linear_head_dim", "linear_attn_config.head_dim"),
        Twofold("delta.conv_width", "linear_conv_kernel_dim", "linear_attn_config.short_conv_kernel_size"),
        SameAs("delta.decay.rank", "delta.head_dim"),
        SameAs("delta.gate_rank", "delta.head_dim"),
        *_expert_rows(),
        Only("moe_router_activation_func", "sigmoid", written=True),
        Only("num_nextn_predict_layers", 0),
        *map(Inert, ("rope_theta", "rope_scaling", "use_grouped_topk")),
    ),
    weights=(
        *trunk_weights(),
        *_dense_and_shared_weights(),
        *block_sparse_moe_weights(),
        Same("layers.{n}.ffn.router.correction_bias", (f"{_SPARSE}.gate.e_score_correction_bias",)),
    ),
    nested=("linear_attn_config",),
    layouts=({**_FORGET_GATE, ".block_sparse_moe.": ".mlp."},),
    defaults={
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 9216,
        "kv_lora_rank": 512,
        "linear_conv_kernel_dim": 4,
        "linear_head_dim": 128,
        "linear_num_heads": 32,
        "model_max_length": 1_048_576,
        "moe_intermediate_size": 1024,
        "moe_renormalize": True,
        "num_expert_group": 1,
        "num_experts": 256,
        "num_experts_per_token": 8,
        "num_shared_experts": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 2.446,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "v_head_dim": 128,
    },
)


def _every_sixth(keys: Keys, num_layers: int) -> list[str]:
    size = keys.integer("layer_group_size", 1, 1_000_000)
    return ["delta" if (layer + 1) % size else "attention" for layer in range(num_layers)]


@dataclass(frozen=True)
class AsAttention:
    """Numbers of Kimi delta attention that are those of the attention; older names come before newer ones."""

    def read(self, keys: Keys, model: Tree) -> None:
        # In the files of transformers `head_dim` is that of the rotation, and `linear_head_dim` says what it was.
        head_dim = keys.take("head_dim", None)
        model.set("delta.head_dim", keys.take("linear_head_dim", head_dim or keys.default("head_dim")))
        model.set("delta.num_heads", keys.take("linear_num_heads", keys.take("num_attention_heads")))
        model.set("delta.conv_width", keys.take_first(("linear_conv_kernel_dim", "short_conv_kernel_size")))

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        delta = model.get("delta") or {}
        config["head_dim"] = config["linear_head_dim"] = delta.get("head_dim", 128)
        config["linear_num_heads"] = delta.get("num_heads", config.get("num_attention_heads"))
        config["linear_conv_kernel_dim"] = config["short_conv_kernel_size"] = delta.get("conv_width", 4)


BAILING_HYBRID = Family(
    model_type="bailing_hybrid",
    architecture="BailingHybridForCausalLM",
    slots={
        "attention": Slot(MLASpec, weights=partial(latent_weights, theirs=f"{LAYER}.attention", out="dense")),
        "delta": Slot(DeltaSpec, weights=_full_rank_weights),
        "mlp": Slot(MLPSpec),
        "moe": Slot(MoESpec),
    },
    layers=Layers(Listed("layer_types", _TYPES, _every_sixth), FirstDense(write_list=True), _KINDS),
    rows=(
        *trunk(context="model_max_length max_position_embeddings"),
        *(row for row in latent_rows() if row != Inert("head_dim")),
        Only("q_lora_rank", None),
        Const("attention.gate", "head"),
        Const("attention.rope.layout", "interleaved"),
        Only("rope_interleave", True),
        Rope(),
        *_delta_rows(),
        AsAttention(),
        Only("kda_safe_gate", True, written=True),
        Field("delta.decay.lower_bound", "kda_lower_bound"),
        *_expert_rows(),
        *map(Inert, ("layer_group_size", "mtp_loss_scaling_factor", "num_nextn_predict_layers")),
    ),
    weights=(
        *trunk_weights(),
        Same("embed.weight", ("model.word_embeddings.weight",)),
        *mlp_weights(),
        *moe_weights(),
        *shared_expert_weights(),
        correction_bias("gate.expert_bias", "gate.e_score_correction_bias"),
    ),
    layouts=(
        {
            **_FORGET_GATE,
            ".attention.dense.": ".self_attn.o_proj.",
            ".attention.": ".self_attn.",
            ".word_embeddings.": ".embed_tokens.",
            ".expert_bias": ".e_score_correction_bias",
        },
    ),
    tied_head=("lm_head.weight", "model.word_embeddings.weight"),
    ignored_weights=(r".*rotary_emb\.inv_freq", r"model\.layers\.42\..*"),  # a block of multi-token prediction
    defaults={
        "attention_bias": False,
        "first_k_dense_replace": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "kda_lower_bound": -5.0,
        "kv_lora_rank": 512,
        "layer_group_size": 6,
        "linear_conv_kernel_dim": 4,
        "model_max_length": 262_144,
        "moe_intermediate_size": 768,
        "moe_renormalize": True,
        "num_expert_group": 8,
        "num_experts": 512,
        "num_experts_per_token": 8,
        "num_shared_experts": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 6_000_000.0,
        "routed_scaling_factor": 2.5,
        "tie_word_embeddings": False,
        "topk_group": 4,
        "v_head_dim": 128,
    },
)
