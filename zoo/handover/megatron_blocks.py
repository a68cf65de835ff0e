"""Blocks as fields of Megatron-Core's TransformerConfig."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.handover.anatomy import Anatomy
from zoo.handover.fields import Field, runs
from zoo.handover.megatron_rope import latent_rope_fields, rope_fields
from zoo.handover.refusals import Refusals
from zoo.spec.attention import AttentionSpec
from zoo.spec.mamba2 import Mamba2Spec
from zoo.spec.mla import MLASpec
from zoo.spec.mlp import ActivationSpec, MLPSpec
from zoo.spec.model import ModelSpec
from zoo.spec.moe import MoESpec
from zoo.spec.router import TopKRouterSpec

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "fast_gelu",
    "relu": "relu",
    "relu2": "squared_relu",
    "clamped_swish": "quick_gelu",
}
"""By the names of Megatron-Bridge's `ACTIVATION_FUNC_MAP`."""
SCORES = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrt_softplus": "sqrtsoftplus"}
ATTENTION = (
    *("type", "num_heads", "num_kv_heads", "head_dim", "v_head_dim", "qkv_bias", "out_bias", "qk_norm", "rope"),
    *("mask", "window", "scale", "sink", "gate"),
)
LATENT = (
    *("type", "num_heads", "d_kv_latent", "d_q_latent", "nope_head_dim", "rope_head_dim", "v_head_dim"),
    *("latent_eps", "rope"),
)
ROUTED = (
    *("type", "num_experts", "top_k", "router", "d_expert", "num_shared_experts", "d_shared_expert", "shared_gate"),
    *("d_latent", "balance", "activation", "activation_limit", "gated", "bias"),
)
ROUTER = (
    *("type", "score", "score_chosen", "normalize", "normalize_eps", "route_scale", "correction_bias", "count_bias"),
    *("num_groups", "top_groups", "group_score", "logit_bias"),
)


def attention_fields(anatomy: Anatomy, refusals: Refusals) -> list[Field]:
    """Of attention by groups of heads; layers may differ in their window and in whether they have positions."""
    blocks = {slot: block for slot, block in anatomy.used(AttentionSpec).items() if isinstance(block, AttentionSpec)}
    slot, block = next(((s, b) for s, b in blocks.items() if b.rope is not None), next(iter(blocks.items())))
    path = f"model.{slot}"
    for other, its in blocks.items():
        refusals.rest(its, f"model.{other}", ATTENTION)
        same = its.replace(mask=block.mask, window=block.window, rope=its.rope and block.rope)
        if same != block.replace(rope=its.rope and block.rope) or (its.rope and its.rope != block.rope):
            refusals.no(
                f"model.{other}", its.type, f"has one attention; it differs from {slot} in more than its window"
            )
        if its.mask == "chunked":
            refusals.no(f"model.{other}.mask", its.mask, "has sliding windows, no chunks")
    if block.v_head_dim != block.head_dim:
        refusals.no(f"{path}.v_head_dim", block.v_head_dim, "has values as wide as keys, outside of latent attention")
    if block.qk_norm == "full":
        refusals.no(f"{path}.qk_norm", block.qk_norm, "norms head by head")
    if block.gate == "head":
        refusals.no(f"{path}.gate", block.gate, "gates channel by channel")
    made = [
        Field("num_attention_heads", block.num_heads, f"{path}.num_heads"),
        Field("num_query_groups", block.num_kv_heads, f"{path}.num_kv_heads"),
        Field("kv_channels", block.head_dim, f"{path}.head_dim"),
        Field("add_qkv_bias", block.qkv_bias, f"{path}.qkv_bias"),
        Field("qk_layernorm", block.qk_norm == "head", f"{path}.qk_norm"),
        *rope_fields(block, path, refusals),
    ]
    if block.scale is not None:
        made.append(Field("softmax_scale", block.scale, f"{path}.scale"))
    if block.sink:
        made.append(Field("softmax_type", "learnable", f"{path}.sink"))
    if block.gate == "element":
        made.append(Field("attention_output_gate", True, f"{path}.gate"))
    return made + _by_layer(anatomy, blocks, refusals)


def _by_layer(anatomy: Anatomy, blocks: dict[str, AttentionSpec], refusals: Refusals) -> list[Field]:
    """Windows and missing positions, layer by layer."""
    layers = [blocks.get(slot or "") for slot in anatomy.mixers]
    windows = sorted({block.window for block in blocks.values() if block.window is not None})
    made = []
    if len(windows) > 1:
        refusals.no("model.*.window", windows, "has one window for all layers that have one")
    elif windows:
        # zoo counts the query's own key in, Megatron-Core counts the keys to its left.
        made.append(Field("window_size", (windows[0] - 1, 0), "window, without the query's own key"))
        sliding = [int(block is not None and block.window is not None) for block in layers]
        made.append(Field("window_attn_skip_freq", runs(sliding), "model.layers: 1 slides"))
    bare = [int(block is not None and block.rope is None) for block in layers]
    if any(bare) and not all(block is None or block.rope is None for block in layers):
        made.append(Field("no_rope_freq", runs(bare), "model.layers: 1 has no positions"))
    return made


def latent_fields(slot: str, block: MLASpec, spec: ModelSpec, refusals: Refusals) -> list[Field]:
    """Of multi-head latent attention."""
    path = f"model.{slot}"
    refusals.rest(block, path, LATENT)
    if block.latent_eps not in (None, spec.norm.eps):
        refusals.no(f"{path}.latent_eps", block.latent_eps, f"norms latents with the model's eps, {spec.norm.eps}")
    return [
        Field("multi_latent_attention", True, f"{path}.type"),
        Field("num_attention_heads", block.num_heads, f"{path}.num_heads"),
        Field("num_query_groups", block.num_heads, f"{path}.num_heads: every head has its own keys"),
        Field("q_lora_rank", block.d_q_latent, f"{path}.d_q_latent"),
        Field("kv_lora_rank", block.d_kv_latent, f"{path}.d_kv_latent"),
        Field("qk_head_dim", block.nope_head_dim, f"{path}.nope_head_dim"),
        Field("qk_pos_emb_head_dim", block.rope_head_dim, f"{path}.rope_head_dim"),
        Field("v_head_dim", block.v_head_dim, f"{path}.v_head_dim"),
        Field("qk_layernorm", True, f"{path}: latents are normed"),
        Field("position_embedding_type", "rope", f"{path}.rope"),
        *latent_rope_fields(block, path, refusals),
    ]


def mamba_fields(slot: str, block: Mamba2Spec, refusals: Refusals) -> list[Field]:
    """Of Mamba-2."""
    path = f"model.{slot}"
    carried = ("type", "num_heads", "head_dim", "num_groups", "d_state", "chunk_size")
    refusals.rest(block, path, carried)
    return [
        Field("is_hybrid_model", True, "model.layers"),
        Field("mamba_num_heads", block.num_heads, f"{path}.num_heads"),
        Field("mamba_head_dim", block.head_dim, f"{path}.head_dim"),
        Field("mamba_num_groups", block.num_groups, f"{path}.num_groups"),
        Field("mamba_state_dim", block.d_state, f"{path}.d_state"),
        Field("mamba_chunk_size", block.chunk_size, f"{path}.chunk_size"),
    ]


def activation_fields(blocks: Sequence[tuple[str, ActivationSpec]], refusals: Refusals) -> list[Field]:
    """Of all dense blocks and experts, which share them."""
    slot, first = blocks[0]
    names = ("activation", "activation_limit", "gated")
    for other, block in blocks[1:]:
        for name in names:
            if getattr(block, name) != getattr(first, name):
                refusals.no(f"model.{other}.{name}", getattr(block, name), f"has that of {slot} for all layers")
    if first.activation not in ACTIVATIONS:
        refusals.no(f"model.{slot}.activation", first.activation, f"has {', '.join(ACTIVATIONS)}")
        return []
    made = [
        Field("activation_func", ACTIVATIONS[first.activation], f"model.{slot}.activation"),
        Field("gated_linear_unit", first.gated, f"model.{slot}.gated"),
    ]
    if first.activation == "clamped_swish":
        made.append(Field("activation_func_clamp_value", first.activation_limit, f"model.{slot}.activation_limit"))
        made.append(Field("glu_linear_offset", 1.0, f"model.{slot}.activation: times (up + 1)"))
    return made


def dense_fields(slot: str, block: MLPSpec, refusals: Refusals) -> list[Field]:
    """Of the dense channel mixer."""
    refusals.rest(block, f"model.{slot}", ("type", "d_ffn", "activation", "activation_limit", "gated", "bias"))
    return [Field("ffn_hidden_size", block.d_ffn, f"model.{slot}.d_ffn")]


def moe_fields(slot: str, block: MoESpec, refusals: Refusals) -> list[Field]:
    """Of the mixture of experts, without its router."""
    path, balance = f"model.{slot}", block.balance
    refusals.rest(block, path, ROUTED, ("combine",))
    level = {"batch": "aux_loss", "sequence": "seq_aux_loss"}[balance.level]
    made = [
        Field("num_moe_experts", block.num_experts, f"{path}.num_experts"),
        Field("moe_router_topk", block.top_k, f"{path}.top_k"),
        Field("moe_ffn_hidden_size", block.d_expert, f"{path}.d_expert"),
        Field("moe_router_load_balancing_type", level if balance.aux_loss else "none", f"{path}.balance.level"),
        Field("moe_aux_loss_coeff", balance.aux_loss, f"{path}.balance.aux_loss"),
        Field("moe_router_dtype", "fp32", "zoo: router arithmetic is fp32"),
        Field("moe_grouped_gemm", True, "zoo export: one grouped product for all experts"),
        Field("moe_token_dispatcher_type", "alltoall", "zoo export: no token is dropped"),
    ]
    if balance.z_loss:
        made.append(Field("moe_z_loss_coeff", balance.z_loss, f"{path}.balance.z_loss"))
    if block.d_shared:
        made.append(Field("moe_shared_expert_intermediate_size", block.d_shared, f"{path}.num_shared_experts, width"))
        made.append(Field("moe_shared_expert_gate", block.shared_gate, f"{path}.shared_gate"))
    if block.d_latent:
        made.append(Field("moe_latent_size", block.d_latent, f"{path}.d_latent"))
    if not isinstance(block.router, TopKRouterSpec):
        refusals.no(f"{path}.router.type", block.router.type, "chooses by top-k alone")
        return made
    return made + _router_fields(f"{path}.router", block, block.router, refusals)


def _router_fields(path: str, moe: MoESpec, router: TopKRouterSpec, refusals: Refusals) -> list[Field]:
    """Megatron-Core's `topk_routing_with_score_function`: softmax before the choice leaves weights as they are, softmax
    after it is the same as dividing by their sum; sigmoids are divided by their sum from two experts on."""
    refusals.rest(router, path, ROUTER, ("arithmetic",))
    softmax = router.score == "softmax"
    divided = router.normalize or router.score_chosen if softmax else router.normalize
    if not softmax and divided != (moe.top_k > 1):
        refusals.no(
            f"{path}.normalize", router.normalize, "divides such scores by their sum from top_k 2 on, and only then"
        )
    if softmax and moe.top_k == 1 and divided:
        refusals.no(f"{path}.normalize", router.normalize, "cannot train one expert of weight 1")
    if not softmax and router.score_chosen:
        refusals.no(f"{path}.score_chosen", True, "scores only the chosen with softmax alone")
    if softmax and router.correction_bias:
        refusals.no(f"{path}.correction_bias", True, "has it for sigmoid and sqrt_softplus alone")
    made = [
        Field("moe_router_score_function", SCORES[router.score], f"{path}.score"),
        Field("moe_router_pre_softmax", softmax and not divided, f"{path}.normalize"),
        Field("moe_router_enable_expert_bias", router.correction_bias, f"{path}.correction_bias"),
    ]
    if router.correction_bias:
        where = f"{path.rpartition('.')[0]}.balance.bias_update_rate"
        made.append(Field("moe_router_bias_update_rate", moe.balance.bias_update_rate, where))
    if router.route_scale != 1.0:
        made.append(Field("moe_router_topk_scaling_factor", router.route_scale, f"{path}.route_scale"))
    if router.num_groups > 1:
        best = {"max": 1, "top2_sum": 2}[router.group_score]
        if moe.top_k // router.top_groups != best:
            why = f"scores a group by its best top_k // top_groups experts, {moe.top_k // router.top_groups}"
            refusals.no(f"{path}.group_score", router.group_score, why)
        if softmax and divided:
            refusals.no(f"{path}.num_groups", router.num_groups, "would score groups by logits")
        made.append(Field("moe_router_num_groups", router.num_groups, f"{path}.num_groups"))
        made.append(Field("moe_router_group_topk", router.top_groups, f"{path}.top_groups"))
    return made
