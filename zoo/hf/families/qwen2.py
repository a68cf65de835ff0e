"""Qwen2 and Qwen2.5, dense and mixture of experts."""

from __future__ import annotations

from zoo.hf.families.qwen3 import LateWindows
from zoo.hf.families.shared import attention_weights, mlp_weights, moe_weights, shared_expert_weights, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.keys import Keys
from zoo.hf.layers import Always, Layers, SparseSteps
from zoo.hf.mtp import MTP, MTPNames
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, Inert, Only, SharedWidth, heads, swiglu, trunk
from zoo.hf.weights import Same
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

_DEFAULTS = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32_768,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
_SLOTS = {
    "attention": Slot(AttentionSpec, {"mask": "causal"}),
    "local": Slot(AttentionSpec, {"mask": "sliding"}, like="attention"),
}
_MTP_NAMES = {
    "embed_norm": "model.mtp_layers.{first}.token_layernorm",
    "hidden_norm": "model.mtp_layers.{first}.hidden_layernorm",
    "proj": "model.mtp_layers.{first}.input_proj",
    "norm": "model.mtp_layers.{first}.final_layernorm",
}

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    slots={**_SLOTS, "mlp": Slot(MLPSpec)},
    layers=Layers(LateWindows(), Always("mlp"), {"dense": ("attention", "mlp"), "local": ("local", "mlp")}),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Only("attention_bias", True),  # of queries, keys and values
        Const("attention.qkv_bias", True),
        Rope(),
        Const("local.mask", "sliding"),
        Field("local.window", "sliding_window"),
        *swiglu(),
        MTP("dense"),
    ),
    weights=(*trunk_weights(), *attention_weights(), *mlp_weights()),
    defaults={**_DEFAULTS, "head_dim": None},
    mtp=MTPNames(_MTP_NAMES, blocks="model.mtp_", hidden_first=True),
)


def _early_windows(keys: Keys, num_layers: int) -> list[str]:
    """Every second of the first `max_window_layers` layers slides if `use_sliding_window` is true."""
    last = keys.integer("max_window_layers", 0, 1_000_000)
    slides = bool(keys.take("use_sliding_window"))
    return ["local" if slides and layer % 2 == 0 and layer < last else "attention" for layer in range(num_layers)]


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    slots={**_SLOTS, "mlp": Slot(MLPSpec), "moe": Slot(MoESpec)},
    layers=Layers(
        LateWindows(_early_windows),
        SparseSteps(),
        {
            "dense": ("attention", "mlp"),
            "sparse": ("attention", "moe"),
            "local_dense": ("local", "mlp"),
            "local_sparse": ("local", "moe"),
        },
    ),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "qkv_bias"),
        Rope(),
        Const("local.mask", "sliding"),
        Field("local.window", "sliding_window"),
        *swiglu(),
        Field("moe.num_experts", "num_experts num_local_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "moe_intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        SharedWidth("moe", "shared_expert_intermediate_size"),
        Const("moe.shared_gate", True),
        Const("moe.router.type", "top_k"),
        Field("moe.router.normalize", "norm_topk_prob"),
        Field("moe.balance.aux_loss", "router_aux_loss_coef"),
        Inert("max_window_layers"),
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        *mlp_weights(),
        *moe_weights(),
        *shared_expert_weights("shared_expert"),
        Same("layers.{n}.ffn.shared_gate.weight", ("model.layers.{n}.mlp.shared_expert_gate.weight",)),
    ),
    defaults={
        **_DEFAULTS,
        "decoder_sparse_step": 1,
        "head_dim": None,
        "intermediate_size": 5632,
        "mlp_only_layers": None,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632,
    },
)
