"""Blocks as compiled calls: which the kernels know, and what they make of them."""

from __future__ import annotations

import ctypes
from typing import cast

import torch
from torch import Tensor, nn

from zoo.blocks.attention import Attention
from zoo.blocks.base import Block
from zoo.blocks.cache import GrowingCache
from zoo.blocks.mlp import MLP
from zoo.blocks.moe import MoE
from zoo.blocks.parallel import Parallel
from zoo.blocks.rope import depends_on_length
from zoo.blocks.router import Router
from zoo.decoding.parts import add, linear, mlp, norm, norm_of, product
from zoo.decoding.steps import Steps, fit
from zoo.native.calls import (
    DTYPES,
    MASKS,
    NORMS,
    SCORES,
    AttendCall,
    NormCall,
    RouteCall,
    expert_matrices,
    feed_call,
    pointer,
)
from zoo.native.calls import Norm as NormArguments


def knows_mixer(block: nn.Module, state: object) -> bool:
    """Whether there are calls for this sequence mixer. Subclasses may compute something else."""
    if type(block) is not Attention or not isinstance(state, GrowingCache) or not fit(block):
        return False
    rope = block.spec.rope
    follows_length = rope is not None and depends_on_length(rope)
    return block.indexer is None and not follows_length and all(buffer.dtype in DTYPES for buffer in state.buffers)


def knows_ffn(block: nn.Module) -> bool:
    """Whether there are calls for this channel mixer."""
    if type(block) is Parallel:
        return fit(block) and type(block.moe.router) is Router
    return fit(block) and (type(block) is MLP or (type(block) is MoE and type(block.router) is Router))


def ffn(steps: Steps, block: Block, x: Tensor) -> Tensor:
    """A channel mixer that `knows_ffn` knows: x [b, d] -> [b, d]."""
    if isinstance(block, MLP):
        return mlp(steps, block, x)
    if isinstance(block, MoE):
        return moe(steps, block, x, x)
    return parallel(steps, cast(Parallel, block), x)


def parallel(steps: Steps, block: Parallel, x: Tensor) -> Tensor:
    dense = norm(steps, block.dense_post_norm, mlp(steps, block.dense, norm(steps, block.dense_norm, x)))
    routed = norm(steps, block.moe_post_norm, moe(steps, block.moe, norm(steps, block.moe_norm, x), x))
    add(steps, dense, routed)
    return dense


def moe(steps: Steps, block: MoE, x: Tensor, router_input: Tensor) -> Tensor:
    router = cast(Router, block.router)
    weights, indices = _route(steps, router, router_input)
    tokens = x if block.latent_down is None else linear(steps, block.latent_down, x)
    stack, gated = block.experts.stacked, block.spec.gated
    hidden, y = steps.buffer(indices.numel(), stack.down.shape[2]), steps.buffer(*tokens.shape)
    matrices = expert_matrices(*stack, gated)
    found = feed_call(matrices, block.experts.spec, tokens, weights, indices, hidden, y, router.weighs_input)
    steps.call(found, block, tokens, weights, indices, hidden, y)
    y = norm(steps, block.latent_norm, y)
    if block.latent_up is not None:
        y = linear(steps, block.latent_up, y)
    if block.shared is not None:
        gate = block.shared_gate
        opening = None if gate is None else linear(steps, gate, x, "sigmoid", wait=False)
        add(steps, y, mlp(steps, block.shared, x), opening=opening)
    return y


def _route(steps: Steps, router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [b, c] fp32 and indices [b, c] int64."""
    spec = router.spec
    if router.input_scale is not None:
        x = _scaled_norm(steps, router.input_scale, router.norm_spec.eps, x)
    logits = product(steps, router.weight, x, router.bias)
    weights = steps.buffer(len(x), router.top_k)
    indices = steps.buffer(len(x), router.top_k, dtype=torch.int64)
    correction, scale = (
        None if tensor is None else tensor.detach().to(torch.float32)
        for tensor in (router.correction_bias, router.expert_scale)
    )
    arguments = RouteCall(
        *map(pointer, (logits, correction, scale, weights, indices)),
        *(len(x), router.num_experts, router.top_k, SCORES[spec.score], spec.score_chosen, spec.normalize),
        *(spec.num_groups, spec.top_groups, spec.group_score == "max", spec.normalize_eps, spec.route_scale),
    )
    steps.call(arguments, logits, correction, scale, weights, indices)
    return weights, indices


def _scaled_norm(steps: Steps, scale: Tensor, eps: float, x: Tensor) -> Tensor:
    weight = scale.detach().to(torch.float32) * x.shape[-1] ** -0.5
    y = steps.buffer(*x.shape)
    described = NormArguments(NORMS["rms"], x.shape[-1], pointer(weight), None, eps)
    steps.call(NormCall(described, pointer(x), pointer(y), len(x)), x, y, weight)
    return y


def attention(steps: Steps, block: Attention, state: GrowingCache, x: Tensor) -> Tensor:
    """x [b, d] -> [b, d]; `state` holds the tokens before and grows by one with every pass."""
    spec = block.spec
    gate = None
    if block.gate is not None:
        squash = spec.gate_activation
        gate = linear(steps, block.gate, x, squash, wait=False)
    q = linear(steps, block.q, x, wait=False)
    k = linear(steps, block.k, x, wait=block.v is None)
    v = steps.buffer(len(x), spec.num_kv_heads * block.v_head_dim) if block.v is None else linear(steps, block.v, x)
    y = steps.buffer(len(x), spec.num_heads * block.v_head_dim)
    scores = steps.buffer(len(x) * spec.num_heads, state.capacity)
    arguments, kept = _attend_call(steps, block, state, len(x))
    for name, tensor in {"q": q, "k": k, "v": v, "gate": gate, "scores": scores, "y": y}.items():
        setattr(arguments, name, pointer(tensor))
    arguments.gate_width = 0 if gate is None else gate.shape[1]
    steps.call(arguments, block, state.buffers, kept, q, k, v, gate, scores, y)

    def remember() -> None:
        arguments.length = state.advance(1)

    steps.before(remember)
    return linear(steps, block.out, y)


def _attend_call(steps: Steps, block: Attention, state: GrowingCache, rows: int) -> tuple[AttendCall, list[object]]:
    """All that is known before the first pass, and what it points to."""
    spec, (keys, values) = block.spec, state.buffers
    norms = [norm_of(found) for found in (block.q_norm, block.k_norm, block.v_norm)]
    sink = None if block.sink is None else block.sink.detach().to(torch.float32)
    call = AttendCall(ctypes.addressof(steps.info), keys=pointer(keys), values=pointer(values), sink=pointer(sink))
    call.q_norm, call.k_norm, call.v_norm = (found for found, _ in norms)
    call.rows, call.heads, call.groups = rows, spec.num_heads, spec.num_kv_heads
    call.d, call.dv, call.capacity = block.head_dim, block.v_head_dim, state.capacity
    call.cache_dtype = DTYPES[keys.dtype]
    kept: list[object] = [steps.info, sink, norms]
    if spec.rope is not None:
        cos, sin = steps.tables(spec.rope, spec.rope.rotary_dim(block.head_dim))
        call.cos, call.sin, call.half, call.table_start = pointer(cos), pointer(sin), cos.shape[1], steps.table_start
        call.interleaved = spec.rope.layout == "interleaved"
        kept += [cos, sin]
    call.norm_after_rope, call.shared_kv = spec.qk_norm_after_rope, spec.shared_kv
    call.mask, call.window = MASKS[spec.mask], spec.window or 0
    call.scale, call.softcap, call.clip = block.scale, spec.softcap or 0.0, spec.qkv_clip or 0.0
    call.value_scale = spec.value_scale
    if spec.query_scale is not None:
        call.query_beta, call.query_shift = spec.query_scale.beta, spec.query_scale.shift
        call.query_context = spec.query_scale.original_context
    return call, kept
