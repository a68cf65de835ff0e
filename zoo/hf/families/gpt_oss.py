"""gpt-oss."""

from __future__ import annotations

from zoo.hf.families.shared import LAYER, attention_weights, trunk_weights
from zoo.hf.family import Family, Slot
from zoo.hf.layers import Always, Layers, every_second_full, windows
from zoo.hf.rope import Rope
from zoo.hf.rows import Const, Field, Inert, Only, heads, trunk
from zoo.hf.weights import Interleaved, Same, Transposed
from zoo.spec.attention import AttentionSpec
from zoo.spec.moe import MoESpec

_MLP = f"{LAYER}.mlp"

GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    slots={
        "attention": Slot(AttentionSpec, {"mask": "causal"}),
        "local": Slot(AttentionSpec, {"mask": "sliding"}, like="attention"),
        "moe": Slot(MoESpec),
    },
    layers=Layers(
        windows(every_second_full), Always("moe"), {"sparse": ("attention", "moe"), "local": ("local", "moe")}
    ),
    rows=(
        *trunk(),
        Const("norm.weight", "wide"),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "attention_bias"),
        Field("attention.out_bias", "attention_bias"),
        Const("attention.sink", True),
        Rope(scaled=True),
        Const("local.mask", "sliding"),
        Field("local.window", "sliding_window"),
        Field("moe.num_experts", "num_local_experts num_experts"),
        Field("moe.top_k", "num_experts_per_tok experts_per_token"),
        Field("moe.d_expert", "intermediate_size"),
        Const("moe.activation", "clamped_swish"),
        Field("moe.activation_limit", "swiglu_limit"),
        Only("swiglu_alpha", 1.702),
        Only("hidden_act", "silu"),
        Const("moe.bias", True),
        Const("moe.router.type", "top_k"),
        Const("moe.router.score_chosen", True),
        Const("moe.router.normalize", False),
        Const("moe.router.logit_bias", True),
        Const("moe.router.arithmetic", "model"),
        Field("moe.balance.aux_loss", "router_aux_loss_coef"),
        Inert("initial_context_length"),
    ),
    weights=(
        *trunk_weights(),
        *attention_weights(),
        Same("layers.{n}.mixer.sink", (f"{LAYER}.self_attn.sinks",)),
        Same("layers.{n}.ffn.router.weight", (f"{_MLP}.router.weight",)),
        Same("layers.{n}.ffn.router.bias", (f"{_MLP}.router.bias",)),
        Interleaved("layers.{n}.ffn.experts.gate_up", f"{_MLP}.experts.gate_up_proj"),
        Interleaved("layers.{n}.ffn.experts.gate_up_bias", f"{_MLP}.experts.gate_up_proj_bias"),
        Transposed("layers.{n}.ffn.experts.down", f"{_MLP}.experts.down_proj"),
        Same("layers.{n}.ffn.experts.down_bias", (f"{_MLP}.experts.down_proj_bias",)),
    ),
    defaults={
        "attention_bias": True,
        "head_dim": 64,
        "initializer_range": 0.02,
        "max_position_embeddings": 131_072,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "router_aux_loss_coef": 0.001,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
    },
)
