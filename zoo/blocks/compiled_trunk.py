"""The fastest paths of what lies between a decoder's products on a CPU, where the compiled kernels are at hand.

Norms, gated activations, rotary positions, causal attention and the cross-entropy, each as one call in fp32 that keeps
nothing for the backward pass but its arguments and a number a row. The callers have the same in plain torch.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.blocks.compiled_mixers import fits
from zoo.native.library import library


class RMSNorm(torch.autograd.Function):
    """x / root(mean(x^2) + eps) * weight over the last axis: x [..., d], weight [d] or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x = x.contiguous()
        y, factor = torch.empty_like(x), x.new_empty(x.shape[:-1])
        call("rms_forward", factor.numel(), x.shape[-1], torch.get_num_threads(), eps, x, weight, y, factor)
        ctx.save_for_backward(x, weight, factor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        threads, x_grad = torch.get_num_threads(), torch.empty_like(x)
        parts = x.new_empty(threads, x.shape[-1]) if ctx.needs_input_grad[1] else None
        sizes = (factor.numel(), x.shape[-1], threads)
        call("rms_backward", *sizes, x, weight, factor, grad.contiguous(), x_grad, parts)
        return x_grad, None if parts is None else parts.sum(0), None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, of one shape."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grads = torch.empty_like(gate), torch.empty_like(up)
        call("swiglu_backward", gate.numel(), torch.get_num_threads(), gate, up, grad.contiguous(), *grads)
        return grads


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of contiguous tensors, without a gradient."""
    y = torch.empty_like(gate)
    call("swiglu_forward", gate.numel(), torch.get_num_threads(), gate, up, y)
    return y


class Turn(torch.autograd.Function):
    """The leading channels of x [b, s, h, k] turned by cos and sin [b or 1, s, r / 2], as `zoo.blocks.rope.rotate`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.interleaved = interleaved
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, interleaved, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, ctx.interleaved, back=True), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    x = x.contiguous()
    y, half = torch.empty_like(x), cos.shape[-1]
    sizes = (len(x) * x.shape[1], *x.shape[2:], half, cos.numel() // half)
    call("turn_heads", *sizes, int(interleaved), int(back), torch.get_num_threads(), x, cos, sin, y)
    return y


class _AttendSizes(Structure):
    """As in trunk.cpp."""

    _fields_ = [(name, c_int64) for name in "batch s heads groups d dv threads".split()]


class CausalAttention(torch.autograd.Function):
    """q [b, s, h, k], k [b, s, g, k], v [b, s, g, v]; the result [b, s, h, v]. No matrix of scores is kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (batch, s, heads, d), (groups, dv) = q.shape, v.shape[2:]
        y, logs = q.new_empty(batch, s, heads, dv), q.new_empty(batch, heads, s)
        ctx.sizes, ctx.scale = _AttendSizes(batch, s, heads, groups, d, dv, torch.get_num_threads()), scale
        call("attend_forward", ctx.sizes, scale, q, k, v, y, logs)
        ctx.save_for_backward(q, k, v, logs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, logs = ctx.saved_tensors
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        call("attend_backward", ctx.sizes, ctx.scale, q, k, v, logs, grad.contiguous(), *grads)
        return (*grads, None)


def attention_fits(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether `CausalAttention` computes this and its threads have work: q [b, s, h, k], k and v [b, n, g, k and v]."""
    return (
        scale > 0
        and fits(q, k, v)
        and q.shape[1] == k.shape[1] > 1
        and (not torch.is_grad_enabled() or len(q) * k.shape[2] >= torch.get_num_threads())
    )


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy [t] of logits [t, v] and targets [t] int64, those below 0 aside; logits become gradients."""
    losses = logits.new_empty(len(logits))
    call("cross_entropy", *logits.shape, torch.get_num_threads(), logits, targets.contiguous(), losses)
    return losses


def call(name: str, *given: Tensor | Structure | float | None) -> None:
    """Call a kernel: sizes as integers, other numbers as fp64, tensors by their addresses."""
    kernels = library()
    assert kernels is not None
    getattr(kernels, name)(*map(_argument, given))


def _argument(value: Tensor | Structure | float | None) -> Any:
    if value is None:
        return c_void_p()
    if isinstance(value, Tensor):
        return c_void_p(value.data_ptr())
    if isinstance(value, Structure):
        return ctypes.byref(value)
    return c_int64(value) if isinstance(value, int) else c_double(value)
