"""Ling and Ring 2.0, whose code is on the hub and not in transformers."""

from __future__ import annotations

from collections.abc import Iterator

from zoo.hf.families.shared import LAYER, mlp_weights, moe_weights, norm_weights, router_groups, sigmoid_router
from zoo.hf.family import Family, Slot
from zoo.hf.layers import Always, FirstDense, Layers
from zoo.hf.mtp import MTP, MTPNames
from zoo.hf.rope import Rope
from zoo.hf.rows import ACTIVATIONS, Const, Field, Inert, Only, SharedWidth, heads, swiglu, trunk
from zoo.hf.weights import Fused, JointRow, Same, WeightRow
from zoo.spec.attention import AttentionSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec

_OFF = """
    attention_dropout embedding_dropout output_dropout moe_shared_expert_overlap norm_softmax norm_head
    use_sliding_window
"""


def _weights() -> Iterator[WeightRow | JointRow]:
    yield Same("embed.weight", ("model.word_embeddings.weight",))
    yield Same("norm.weight", ("model.norm.weight",))
    yield Same("head.weight", ("lm_head.weight",))
    yield from norm_weights({"mixer_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"})
    for kind in ("weight", "bias"):
        qkv = tuple(f"layers.{{n}}.mixer.{part}.{kind}" for part in "qkv")
        yield Fused(qkv, f"{LAYER}.attention.query_key_value.{kind}")
        yield Same(f"layers.{{n}}.mixer.out.{kind}", (f"{LAYER}.attention.dense.{kind}",))
    for ours, theirs in {"q_norm": "query_layernorm", "k_norm": "key_layernorm"}.items():
        yield Same(f"layers.{{n}}.mixer.{ours}.weight", (f"{LAYER}.attention.{theirs}.weight",))
    yield from mlp_weights()
    yield from moe_weights()
    yield Same("layers.{n}.ffn.router.correction_bias", (f"{LAYER}.mlp.gate.expert_bias",))
    for part in ("gate", "up", "down"):
        yield Same(f"layers.{{n}}.ffn.shared.{part}.weight", (f"{LAYER}.mlp.shared_experts.{part}_proj.weight",))


BAILING_MOE = Family(
    model_type="bailing_moe",
    architecture="BailingMoeV2ForCausalLM",
    slots={"attention": Slot(AttentionSpec), "mlp": Slot(MLPSpec), "moe": Slot(MoESpec)},
    layers=Layers(
        Always("attention"), FirstDense(listed=None), {"dense": ("attention", "mlp"), "sparse": ("attention", "moe")}
    ),
    rows=(
        *trunk(),
        *heads(),
        Field("attention.head_dim", "head_dim"),
        Field("attention.qkv_bias", "use_qkv_bias"),
        Field("attention.out_bias", "use_bias"),
        Field("attention.qk_norm", "use_qk_norm", {True: "head", False: "none"}),
        Rope(fraction=True),
        Inert("rotary_dim"),  # follows from partial_rotary_factor
        *swiglu(),
        Field("mlp.bias", "use_bias"),
        Field("moe.num_experts", "num_experts"),
        Field("moe.top_k", "num_experts_per_tok"),
        Field("moe.d_expert", "moe_intermediate_size"),
        Field("moe.activation", "hidden_act", ACTIVATIONS),
        SharedWidth("moe", "moe_shared_expert_intermediate_size"),
        Only("num_shared_experts", 1),
        *sigmoid_router(),
        Const("moe.router.count_bias", True),
        *router_groups(),
        Only("moe_router_enable_expert_bias", True),
        Only("score_function", "sigmoid"),
        Inert("router_dtype"),
        *(Only(key, False) for key in _OFF.split()),
        MTP("sparse"),
    ),
    weights=tuple(_weights()),
    defaults={
        "first_k_dense_replace": 0,
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "moe_shared_expert_intermediate_size": None,
        "norm_topk_prob": True,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 600_000.0,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "use_bias": False,
        "use_qk_norm": False,
        "use_qkv_bias": False,
    },
    tied_head=("lm_head.weight", "model.word_embeddings.weight"),
    mtp=MTPNames(),
)
