"""DeepSeek V2, V3 and V3.2, and the models that took over their architectures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zoo.hf.families.latent import indexer_rows, latent_rows, latent_weights
from zoo.hf.families.shared import (
    correction_bias,
    mlp_weights,
    moe_weights,
    router_groups,
    shared_expert_weights,
    sigmoid_router,
    trunk_weights,
)
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys, refused
from zoo.hf.layers import Always, FirstDense, Layers, Listed, all_full
from zoo.hf.mtp import MTP, MTPNames
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, Inert, Only, Row, Tree, swiglu, trunk
from zoo.hf.weights import JointRow, WeightRow
from zoo.spec.mla import MLASpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

SLOTS = {"attention": Slot(MLASpec, weights=latent_weights), "mlp": Slot(MLPSpec), "moe": Slot(MoESpec)}
KINDS = {"dense": ("attention", "mlp"), "sparse": ("attention", "moe")}
INDEXED = Listed("layer_types", {"indexed_attention": "attention"}, all_full)
DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "aux_loss_alpha": 0.0,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "intermediate_size": 18_432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_key_value_heads": None,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_interleave": True,
    "rope_theta": 10_000.0,
    "routed_scaling_factor": 2.5,
    "seq_aux": False,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "v_head_dim": 128,
}


def expert_rows() -> Iterator[Row]:
    """Routed and shared experts, and the dense layers before them."""
    yield from swiglu()
    yield Field("moe.num_experts", "n_routed_experts num_local_experts")
    yield Field("moe.top_k", "num_experts_per_tok")
    yield Field("moe.d_expert", "moe_intermediate_size")
    yield Field("moe.num_shared_experts", "n_shared_experts")
    yield Field("moe.activation", "hidden_act", ACTIVATIONS)
    yield Field("moe.balance.aux_loss", "aux_loss_alpha")
    yield Field("moe.balance.level", "seq_aux", {True: "sequence", False: "batch"})
    yield Only("moe_layer_freq", 1, written=True)
    yield Inert("ep_size")


def sigmoid_rows() -> Iterator[Row]:
    """The router of V3."""
    yield from sigmoid_router()
    yield from router_groups()
    yield Only("scoring_func", "sigmoid", written=True)
    yield Only("topk_method", "noaux_tc", written=True)


def expert_weights() -> Iterator[WeightRow | JointRow]:
    """What layers hold beside the attention."""
    yield from mlp_weights()
    yield from moe_weights()
    yield from shared_expert_weights()
    yield correction_bias("gate.e_score_correction_bias")


@dataclass(frozen=True)
class Groups:
    """Groups of experts, if `topk_method` says that they count."""

    def read(self, keys: Keys, model: Tree) -> None:
        method, groups, top = keys.take("topk_method"), keys.take("n_group"), keys.take("topk_group")
        if method == "group_limited_greedy":
            model.set("moe.router.num_groups", groups)
            model.set("moe.router.top_groups", top)
            model.set("moe.router.group_score", "max")
        elif method != "greedy":
            raise refused("topk_method", method, "understood: 'greedy', 'group_limited_greedy'")

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        router = model.get("moe.router") or {}
        grouped = router.get("num_groups", 1) != 1 or router.get("group_score") == "max"
        config["topk_method"] = "group_limited_greedy" if grouped else "greedy"
        config["n_group"], config["topk_group"] = router.get("num_groups"), router.get("top_groups")


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    slots=SLOTS,
    layers=Layers(Always("attention"), FirstDense(listed=None), KINDS),
    rows=(
        *trunk(),
        *latent_rows(),
        Const("attention.rope.layout", "interleaved"),
        Const("attention.rope.arithmetic", "complex"),
        Rope(),
        *expert_rows(),
        Field("mlp.bias", "mlp_bias"),
        Const("moe.router.type", "top_k"),
        Const("moe.router.arithmetic", "fp32"),
        Groups(),
        Field("moe.router.route_scale", "routed_scaling_factor"),
        Const("moe.router.normalize", False),
        Only("norm_topk_prob", False),
        Only("scoring_func", "softmax", written=True),
    ),
    weights=(*trunk_weights(), *expert_weights()),
    defaults={
        **DEFAULTS,
        "first_k_dense_replace": 0,
        "intermediate_size": 11_008,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "moe_intermediate_size": 1407,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "topk_method": "greedy",
    },
)

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    aliases=("kimi_k2",),
    architecture="DeepseekV3ForCausalLM",
    slots=SLOTS,
    layers=Layers(Always("attention"), FirstDense(listed=None), KINDS),
    rows=(
        *trunk(),
        *latent_rows(),
        Field("attention.rope.layout", "rope_interleave", {True: "interleaved", False: "half"}),
        Rope(),
        *expert_rows(),
        *sigmoid_rows(),
        MTP("sparse"),
    ),
    weights=(*trunk_weights(), *expert_weights()),
    mtp=MTPNames(),
    defaults=DEFAULTS,
)

DEEPSEEK_V32 = Family(
    model_type="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    slots=SLOTS,
    layers=Layers(INDEXED, FirstDense(), KINDS),
    rows=(
        *trunk(),
        *latent_rows(),
        *indexer_rows(),
        Only("mlp_bias", False),
        Const("attention.indexer.rope_layout", "half"),
        Const("attention.rope.layout", "interleaved"),
        Rope(),
        *expert_rows(),
        *sigmoid_rows(),
        MTP("sparse"),
    ),
    weights=(*trunk_weights(), *expert_weights()),
    mtp=MTPNames(),
    defaults={**DEFAULTS, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048},
)
