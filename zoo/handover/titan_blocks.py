"""Blocks as the configurations that torchtitan builds its modules from."""

from __future__ import annotations

from zoo.handover.fields import Call, Code, Field
from zoo.handover.megatron_rope import temperature
from zoo.handover.names import names_of
from zoo.handover.refusals import Refusals
from zoo.spec.attention import AttentionSpec
from zoo.spec.mla import MLASpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.model import ModelSpec
from zoo.spec.moe import MoESpec
from zoo.spec.rope import BandsScaling, RopeSpec, YarnScaling
from zoo.spec.router import TopKRouterSpec

INIT = "zoo: model.init"
INSIDE, OUT = Code("INSIDE"), Code("OUT")
"""Initial weights: of matrices, and of those that write to the residual stream."""
ATTENTION = ("type", "num_heads", "num_kv_heads", "head_dim", "v_head_dim", "qk_norm", "rope")
LATENT = (
    *("type", "num_heads", "d_kv_latent", "d_q_latent", "nope_head_dim", "rope_head_dim", "v_head_dim"),
    *("latent_eps", "rope"),
)
ROUTED = (
    *("type", "num_experts", "top_k", "router", "d_expert", "num_shared_experts", "d_shared_expert"),
    "balance",
)
ROUTER = (
    *("type", "score", "score_chosen", "normalize", "normalize_eps", "route_scale", "correction_bias", "count_bias"),
    *("num_groups", "top_groups", "group_score"),
)


def norm(width: int, eps: float) -> Call:
    """An RMSNorm.Config."""
    return Call(
        "RMSNorm.Config",
        (
            Field("normalized_shape", width, "model.d_model"),
            Field("eps", eps, "model.norm.eps"),
            Field("param_init", Code("ONES"), INIT),
        ),
    )


def attention(slot: str, block: AttentionSpec, spec: ModelSpec, refusals: Refusals) -> Call:
    """Attention by groups of heads."""
    path = f"model.{slot}"
    refusals.rest(block, path, ATTENTION)
    if block.v_head_dim != block.head_dim:
        refusals.no(f"{path}.v_head_dim", block.v_head_dim, "has values as wide as keys, outside of latent attention")
    if block.qk_norm == "full":
        refusals.no(f"{path}.qk_norm", block.qk_norm, "norms head by head")
    head_dim = block.head_dim or 0
    made = [
        Field("dim", spec.d_model, "model.d_model"),
        Field("n_heads", block.num_heads, f"{path}.num_heads"),
        Field("n_kv_heads", block.num_kv_heads, f"{path}.num_kv_heads"),
        Field("head_dim", head_dim, f"{path}.head_dim"),
        Field("qk_norm", norm(head_dim, spec.norm.eps) if block.qk_norm == "head" else None, f"{path}.qk_norm"),
        Field("rope", rope(block.rope, head_dim, f"{path}.rope", refusals), f"{path}.rope"),
        Field("inner_attention", Code('get_attention_config("flex")'), "zoo export: runs everywhere, also with cp"),
        Field("fuse_qkv", True, "zoo export: one product for all three"),
        Field("wqkv_param_init", INSIDE, INIT),
        Field("wo_param_init", OUT, INIT),
    ]
    if isinstance(block.rope and block.rope.scaling, YarnScaling):
        _check_temperature(block.rope.scaling, f"{path}.rope.scaling", refusals)  # type: ignore[union-attr, arg-type]
    return Call("make_gqa_config", tuple(made))


def latent(slot: str, block: MLASpec, spec: ModelSpec, refusals: Refusals) -> Call:
    """Multi-head latent attention; its dimensions are spelled out, as its own helper has no eps."""
    path, eps = f"model.{slot}", block.latent_eps or spec.norm.eps
    refusals.rest(block, path, LATENT)
    turned = block.rope and block.rope.scaling
    mscale = 1.0
    if isinstance(turned, YarnScaling):
        _check_temperature(turned, f"{path}.rope.scaling", refusals)
        mscale = turned.mscale_all_dim or 0.0
    queries = block.num_heads * block.qk_head_dim
    made = [
        Field("dim", spec.d_model, "model.d_model"),
        Field("n_heads", block.num_heads, f"{path}.num_heads"),
        Field("q_lora_rank", block.d_q_latent or 0, f"{path}.d_q_latent"),
        Field("kv_lora_rank", block.d_kv_latent, f"{path}.d_kv_latent"),
        Field("qk_nope_head_dim", block.nope_head_dim, f"{path}.nope_head_dim"),
        Field("qk_rope_head_dim", block.rope_head_dim, f"{path}.rope_head_dim"),
        Field("v_head_dim", block.v_head_dim, f"{path}.v_head_dim"),
        Field("mscale", mscale, f"{path}.rope.scaling.mscale_all_dim"),
        Field("rope", rope(block.rope, block.rope_head_dim, f"{path}.rope", refusals), f"{path}.rope"),
        Field("inner_attention", Code('get_attention_config("flex")'), "zoo export: runs everywhere, also with cp"),
        Field("q_norm", norm(block.d_q_latent or 1, eps), f"{path}.latent_eps"),
        Field("kv_norm", norm(block.d_kv_latent, eps), f"{path}.latent_eps"),
    ]
    if block.d_q_latent is None:
        made.append(Field("wq", linear(spec.d_model, queries), f"{path}: queries"))
    else:
        made.append(Field("wq_a", linear(spec.d_model, block.d_q_latent), f"{path}: the queries' latent"))
        made.append(Field("wq_b", linear(block.d_q_latent, queries), f"{path}: queries"))
    keys = block.num_heads * (block.nope_head_dim + block.v_head_dim)
    made += [
        Field("wkv_a", linear(spec.d_model, block.d_kv_latent + block.rope_head_dim), f"{path}: latent, shared key"),
        Field("wkv_b", linear(block.d_kv_latent, keys), f"{path}: keys and values"),
        Field("wo", linear(block.num_heads * block.v_head_dim, spec.d_model, OUT), f"{path}: output"),
    ]
    return Call("Attention.Config", tuple(made))


def linear(inputs: int, outputs: int, init: Code = INSIDE) -> Call:
    """A matrix without bias."""
    fields = (("in_features", inputs), ("out_features", outputs))
    sizes = tuple(Field(name, size, "the widths above") for name, size in fields)
    return Call("Linear.Config", (*sizes, Field("param_init", init, INIT)))


def rope(spec: RopeSpec | None, head_dim: int, path: str, refusals: Refusals) -> Call | None:
    """Rotary positions: pairs of neighbours as complex numbers, or halves as cosines and sines."""
    if spec is None:
        refusals.no(path, None, "always has rotary positions")
        return None
    refusals.rest(spec, path, ("theta", "layout", "scaling"), ("arithmetic",))
    scaling, kind = spec.scaling, {"half": "CosSinRoPE", "interleaved": "ComplexRoPE"}[spec.layout]
    made = [
        Field("dim", head_dim, f"{path}: the channels that turn"),
        Field("max_seq_len", Code("CONTEXT"), "above"),
        Field("theta", spec.theta, f"{path}.theta"),
    ]
    if scaling is None:
        return Call(f"{kind}.Config", tuple(made))
    if not isinstance(scaling, (BandsScaling, YarnScaling)):
        refusals.no(f"{path}.scaling.type", scaling.type, "knows bands and yarn")
        return None
    made.append(Field("scaling", names_of("torchtitan")["scaling"][scaling.type], f"{path}.scaling.type"))
    if isinstance(scaling, BandsScaling):
        names = {"scaling_factor": "factor", "low_freq_factor": "low_freq_factor"}
        names |= {"high_freq_factor": "high_freq_factor", "original_max_position_embeddings": "original_context"}
        if kind == "CosSinRoPE":
            kind = "ComplexRoPE"
            note = "bands are there for neighbours alone, which is the same function of permuted rows of wq and wk"
            refusals.notes.append(f"{path}.layout=half: {note}")
    else:
        names = {"rope_factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
        names |= {"original_seq_len": "original_context", "truncate": "truncate"}
    made += [Field(name, getattr(scaling, own), f"{path}.scaling.{own}") for name, own in names.items()]
    return Call(f"{kind}.Config", tuple(made))


def _check_temperature(scaling: YarnScaling, path: str, refusals: Refusals) -> None:
    """Cosines and sines are a pure rotation there; only scores can be scaled."""
    found = temperature(scaling)
    if abs(found - 1.0) > 1e-12:
        refusals.no(f"{path}.mscale", scaling.mscale, f"rotates without a temperature; here it is {found:.6g}")


def dense(slot: str, block: MLPSpec, spec: ModelSpec, refusals: Refusals) -> Call:
    """The dense channel mixer: silu, gated, without biases."""
    refusals.rest(block, f"model.{slot}", ("type", "d_ffn"))
    return feed_forward(block.d_ffn, f"model.{slot}.d_ffn", spec)


def feed_forward(width: int, origin: str, spec: ModelSpec) -> Call:
    """A gated MLP."""
    return Call(
        "make_ffn_config",
        (
            Field("dim", spec.d_model, "model.d_model"),
            Field("hidden_dim", width, origin),
            Field("w1_param_init", INSIDE, INIT),
            Field("w2w3_param_init", OUT, f"{INIT}; w3 as w2, as there is one for both"),
        ),
    )


def moe(slot: str, block: MoESpec, spec: ModelSpec, refusals: Refusals) -> Call:
    """The mixture of experts."""
    path, balance, router = f"model.{slot}", block.balance, block.router
    refusals.rest(block, path, ROUTED, ("combine",))
    for name in ("aux_loss", "z_loss"):
        if getattr(balance, name):
            why = f"has no such loss: set {path}.balance.{name}=0 to train without it"
            refusals.no(f"{path}.balance.{name}", getattr(balance, name), why)
    rate = balance.bias_update_rate or None
    made = [
        Field("num_experts", block.num_experts, f"{path}.num_experts"),
        Field("router", _router(path, block, spec, refusals), f"{path}.router"),
        Field("routed_experts", _experts(path, block, spec)),
        Field("load_balance_coeff", rate, f"{path}.balance.bias_update_rate"),
    ]
    if block.d_shared:
        shared = feed_forward(block.d_shared, f"{path}.num_shared_experts, width", spec)
        made.append(Field("shared_experts", shared))
    if isinstance(router, TopKRouterSpec) and router.correction_bias and rate is None:
        refusals.notes.append(f"{path}.router.correction_bias starts at 0 and is never moved: it is left out")
    if rate is not None:
        refusals.notes.append(
            f"{path}.balance.bias_update_rate: moves are centred there, which chooses the same experts"
        )
    return Call("make_moe_config", tuple(made))


def _experts(path: str, block: MoESpec, spec: ModelSpec) -> Call:
    return Call(
        "make_routed_experts_config",
        (
            Field("dim", spec.d_model, "model.d_model"),
            Field("hidden_dim", block.d_expert, f"{path}.d_expert"),
            Field("num_experts", block.num_experts, f"{path}.num_experts"),
            Field("top_k", block.top_k, f"{path}.top_k"),
            Field("param_init", Code("EXPERTS"), INIT),
            Field("comm_backend", "standard", "zoo export: all-to-all of PyTorch, no token is dropped"),
        ),
    )


def _router(path: str, moe: MoESpec, spec: ModelSpec, refusals: Refusals) -> Call | None:
    """`TokenChoiceTopKRouter`: scores of all experts, the best of them, divided by their sum or not."""
    router, path = moe.router, f"{path}.router"
    if not isinstance(router, TopKRouterSpec):
        refusals.no(f"{path}.type", router.type, "chooses by top-k alone")
        return None
    refusals.rest(router, path, ROUTER, ("arithmetic",))
    if router.score not in ("softmax", "sigmoid"):
        refusals.no(f"{path}.score", router.score, "scores by softmax or sigmoid")
    if router.score_chosen and router.score != "softmax":
        refusals.no(f"{path}.score_chosen", True, "scores all experts; only with softmax is that the same")
    if router.num_groups > 1 and router.group_score != "top2_sum":
        refusals.no(f"{path}.group_score", router.group_score, "scores a group by its two best")
    made = [
        Field("dim", spec.d_model, "model.d_model"),
        Field("num_experts", moe.num_experts, f"{path.rpartition('.')[0]}.num_experts"),
        Field("top_k", moe.top_k, f"{path.rpartition('.')[0]}.top_k"),
        Field("score_func", router.score, f"{path}.score"),
        Field("route_norm", router.normalize or router.score_chosen, f"{path}.normalize"),
        Field("route_scale", router.route_scale, f"{path}.route_scale"),
        Field("gate_param_init", INSIDE, INIT),
    ]
    if router.num_groups > 1:
        made.append(Field("num_expert_groups", router.num_groups, f"{path}.num_groups"))
        made.append(Field("num_limited_groups", router.top_groups, f"{path}.top_groups"))
    return Call("make_router_config", tuple(made))
