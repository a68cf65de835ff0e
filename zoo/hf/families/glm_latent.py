"""GLM-4.7-Flash and GLM-5, A.X-K1 and Mistral Small 4: latent attention in the footsteps of DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoo.hf.families.deepseek import DEFAULTS, KINDS, SLOTS, expert_rows, expert_weights, sigmoid_rows
from zoo.hf.families.latent import indexer_rows, latent_rows, latent_weights
from zoo.hf.families.shared import router_groups, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys, refused
from zoo.hf.layers import Always, FirstDense, Layers, Listed
from zoo.hf.mtp import MTP, MTPNames
from zoo.hf.rope import Rope
from zoo.hf.rows import Const, Field, Inert, Only, trunk
from zoo.hf.weights import Same
from zoo.spec.mla import MLASpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

_LAYOUTS = {True: "interleaved", False: "half"}

GLM4_MOE_LITE = Family(
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    slots=SLOTS,
    layers=Layers(Always("attention"), FirstDense(write_list=True), KINDS),
    rows=(
        *trunk(),
        *latent_rows(),
        Field("attention.rope.layout", "rope_interleave", _LAYOUTS),
        Rope(),
        *expert_rows(),
        *sigmoid_rows(),
        MTP("sparse"),
    ),
    weights=(*trunk_weights(), *expert_weights()),
    mtp=MTPNames(),
    defaults={
        **DEFAULTS,
        "first_k_dense_replace": 1,
        "intermediate_size": 10_240,
        "max_position_embeddings": 202_752,
        "moe_intermediate_size": 1536,
        "n_group": 1,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.8,
        "topk_group": 1,
        "v_head_dim": 256,
    },
)


class Reused(Listed):
    """`indexer_types`: layers that choose keys, and layers that take over the choice of the layer before."""

    def __init__(self) -> None:
        super().__init__("indexer_types", {"full": "attention", "shared": "reusing"}, _by_frequency)

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        for name in ("index_topk_freq", "index_topk_pattern", "index_skip_topk_offset"):
            keys.take(name, None)
        types = keys.take("layer_types", None)
        if types is not None and types != ["indexed_attention"] * num_layers:
            raise refused("layer_types", types, "must be indexed_attention in all layers")
        return super().read(keys, num_layers)

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        super().write(chosen, config)
        config["layer_types"] = ["indexed_attention"] * len(chosen)


def _by_frequency(keys: Keys, num_layers: int) -> list[str]:
    """After the first layers, every so manieth layer chooses keys; a pattern of F and S beats that."""
    pattern = keys.take("index_topk_pattern", None)
    if pattern is not None:
        slots = {"F": "attention", "S": "reusing"}
        if not isinstance(pattern, str) or len(pattern) != num_layers or not set(pattern) <= slots.keys():
            raise refused("index_topk_pattern", pattern, f"must be {num_layers} letters F and S")
        return [slots[letter] for letter in pattern]
    every = max(keys.integer("index_topk_freq", 0, 1_000_000), 1)
    first = keys.integer("index_skip_topk_offset", 0, 1_000_000)
    return ["reusing" if max(layer - first + 1, 0) % every else "attention" for layer in range(num_layers)]


GLM_MOE_DSA = Family(
    model_type="glm_moe_dsa",
    architecture="GlmMoeDsaForCausalLM",
    slots={
        "attention": Slot(MLASpec, {"indexer.reuse": False}, weights=latent_weights),
        "reusing": Slot(MLASpec, {"indexer.reuse": True}, like="attention", weights=latent_weights),
        "mlp": Slot(MLPSpec),
        "moe": Slot(MoESpec),
    },
    layers=Layers(
        Reused(), FirstDense(), {**KINDS, "dense_reusing": ("reusing", "mlp"), "sparse_reusing": ("reusing", "moe")}
    ),
    rows=(
        *trunk(),
        *latent_rows(),
        *indexer_rows(),
        Const("attention.indexer.rope_layout", "interleaved"),
        Const("attention.rope.layout", "interleaved"),
        Const("reusing.indexer.reuse", True),
        Rope(),
        *expert_rows(),
        *sigmoid_rows(),
        Only("mlp_bias", False),
        Only("rope_interleave", True),
        Only("indexer_rope_interleave", True),
        Only("moe_router_dtype", "float32"),
        Inert("index_share_for_mtp_iteration"),
        MTP("sparse"),
    ),
    weights=(*trunk_weights(), *expert_weights()),
    mtp=MTPNames(),
    defaults={
        **DEFAULTS,
        "index_head_dim": 128,
        "index_n_heads": 32,
        "index_skip_topk_offset": 2,
        "index_topk": 2048,
        "index_topk_freq": 1,
        "intermediate_size": 12_288,
        "max_position_embeddings": 202_752,
        "n_group": 1,
        "q_lora_rank": 2048,
        "qk_nope_head_dim": 192,
        "rms_norm_eps": 1e-5,
        "topk_group": 1,
        "v_head_dim": 256,
    },
)

_POST_NORM = ("model.layers.{n}.post_mlp_layernorm.weight", "model.layers.{n}.mlp.post_mlp_layernorm.weight")

AXK1 = Family(
    model_type="axk1",
    architecture="AXK1ForCausalLM",
    slots=SLOTS,
    layers=Layers(
        Always("attention"), FirstDense(write_list=True), KINDS, options={"sparse": {"ffn_placement": "sandwich"}}
    ),
    rows=(
        *trunk(),
        *latent_rows(),
        Field("attention.rope.layout", "rope_interleave", _LAYOUTS),
        Rope(),
        *expert_rows(),
        *sigmoid_rows(),
    ),
    weights=(*trunk_weights(), *expert_weights(), Same("layers.{n}.ffn_post_norm.weight", _POST_NORM)),
    zeros=(r"model\.layers\.\d+\.mlp\.gate\.e_score_correction_bias",),
    ignored_weights=(r".*rotary_emb\.inv_freq", r"model\.layers\.\d+\.post_mlp_layernorm\.weight"),
    defaults={
        **DEFAULTS,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 32_768,
        "n_routed_experts": 192,
    },
)

MISTRAL4 = Family(
    model_type="mistral4",
    architecture="Mistral4ForCausalLM",
    slots=SLOTS,
    layers=Layers(Always("attention"), FirstDense(listed=None), KINDS),
    rows=(
        *trunk(),
        *latent_rows(),
        Field("attention.rope.layout", "rope_interleave", _LAYOUTS),
        Rope(query_scale=True, nested=True, without_effect=("max_position_embeddings", "partial_rotary_factor")),
        *expert_rows(),
        *router_groups(),
        Field("moe.router.route_scale", "routed_scaling_factor"),
        Const("moe.router.type", "top_k"),
        Const("moe.router.arithmetic", "model"),
    ),
    weights=(
        *trunk_weights(),
        *expert_weights(),
        Same("layers.{n}.ffn.experts.gate_up", ("model.layers.{n}.mlp.experts.gate_up_proj",)),
        Same("layers.{n}.ffn.experts.down", ("model.layers.{n}.mlp.experts.down_proj",)),
    ),
    defaults={
        **{name: value for name, value in DEFAULTS.items() if name != "rope_theta"},
        "first_k_dense_replace": 0,
        "intermediate_size": 12_288,
        "kv_lora_rank": 256,
        "max_position_embeddings": 1_048_576,
        "n_group": 1,
        "n_routed_experts": 128,
        "num_experts_per_tok": 4,
        "q_lora_rank": 1024,
        "qk_nope_head_dim": 64,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
    },
)
