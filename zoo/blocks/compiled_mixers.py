"""The fastest paths of recurrent mixers on a CPU: one call of a compiled kernel, where the kernels are at hand.

Each computes in fp32 what its namesake in plain torch does (`zoo.blocks.ssd`, `delta_rule`, `conv`, the gated norms)
and keeps nothing but its arguments for the backward pass.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_int64
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.blocks.compiled import is_ready
from zoo.native.library import library

CHUNK = 64
"""Tokens of a chunk: those matrices of a head stay in the first caches."""
_WORTH = 2**12
"""Numbers below which a call costs more than it saves."""


def fits(*tensors: Tensor | None) -> bool:
    """Whether the kernels can read these: fp32 on a CPU, whole tensors of this process, and enough to be worth it."""
    if torch.compiler.is_compiling():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in given)
        and all(type(tensor) in (Tensor, nn.Parameter) for tensor in given)
        and given[0].numel() >= _WORTH
        and is_ready()
    )


class ConvSizes(Structure):
    """As in pointwise.cpp."""

    _fields_ = [(name, c_int64) for name in "batch s channels width silu threads".split()]


class NormSizes(Structure):
    """As in pointwise.cpp."""

    _fields_ = [(name, c_int64) for name in "rows spans width shared sigmoid gate_last threads".split()]


class SSDSizes(Structure):
    """As in ssd.cpp."""

    _fields_ = [
        (name, c_int64)
        for name in "batch s heads p groups n chunk blocks x_batch x_row b_batch b_row c_batch c_row threads".split()
    ]


class DeltaSizes(Structure):
    """As in delta.cpp."""

    _fields_ = [
        (name, c_int64)
        for name in "batch s heads groups k v chunk q_batch q_row k_batch k_row v_batch v_row threads".split()
    ]


class UnitSizes(Structure):
    """As in pointwise.cpp."""

    _fields_ = [(name, c_int64) for name in "batch s heads width x_batch x_row scaled threads".split()]


class CompiledConv(torch.autograd.Function):
    """activation(bias + taps): x [b, s, c], weight [c, 1, width], bias [c] or None, documents [b, s] int64 or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None, activated: bool
    ) -> Tensor:
        x, weight, documents = x.contiguous(), weight.contiguous(), _whole(documents)
        y = torch.empty_like(x)
        ctx.sizes = ConvSizes(*x.shape, weight.shape[-1], activated, torch.get_num_threads())
        _call("conv_forward", ctx.sizes, x, weight, bias, documents, y)
        ctx.save_for_backward(x, weight, bias, documents)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, documents = ctx.saved_tensors
        x_grad, weight_grad = torch.empty_like(x), weight.new_empty(len(x), *weight.shape)
        bias_grad = None if bias is None else bias.new_empty(len(x), *bias.shape)
        _call("conv_backward", ctx.sizes, x, weight, bias, documents, grad.contiguous(), x_grad, weight_grad, bias_grad)
        return x_grad, _sum(weight_grad), None if bias_grad is None else _sum(bias_grad), None, None


class CompiledGatedNorm(torch.autograd.Function):
    """RMS norm over the last axis of x [..., spans, width], a gate of that shape; weight [width] or [spans width]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, sigmoid: bool, gate_last: bool
    ) -> Tensor:
        x, gate, weight = x.contiguous(), gate.contiguous(), weight.contiguous()
        y, (spans, width) = torch.empty_like(x), x.shape[-2:]
        shared = len(weight) == width
        rows = x.numel() // (spans * width)
        ctx.sizes = NormSizes(rows, spans, width, shared, sigmoid, gate_last, torch.get_num_threads())
        ctx.eps = ctypes.c_double(eps)
        _call("gated_norm_forward", ctx.sizes, x, gate, weight, ctx.eps, y)
        ctx.save_for_backward(x, gate, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        x_grad, gate_grad = torch.empty_like(x), torch.empty_like(gate)
        weight_grad = weight.new_empty(ctx.sizes.threads, len(weight))
        tensors = (x, gate, weight, ctx.eps, grad.contiguous(), x_grad, gate_grad, weight_grad)
        _call("gated_norm_backward", ctx.sizes, *tensors)
        return x_grad, gate_grad, _sum(weight_grad), None, None, None


class CompiledSSD(torch.autograd.Function):
    """Arguments and results of `zoo.blocks.ssd.ssd`, without its chunk size."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, b, c = (_in_rows(part) for part in (x, b, c))
        dt, a, start, documents = dt.contiguous(), a.contiguous(), start.contiguous(), _whole(documents)
        (batch, s, heads, p), (groups, n) = x.shape, b.shape[2:]
        threads = torch.get_num_threads()
        blocks = min(heads // groups, -(-threads // (batch * groups)))
        strides = (stride for part in (x, b, c) for stride in part.stride()[:2])
        ctx.sizes = SSDSizes(batch, s, heads, p, groups, n, min(CHUNK, s), blocks, *strides, threads)
        y, end = x.new_empty(x.shape), torch.empty_like(start)
        _call("ssd_forward", ctx.sizes, x, dt, a, b, c, start, documents, y, end)
        ctx.save_for_backward(x, dt, a, b, c, start, documents)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_end: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, a, b, c, start, documents = ctx.saved_tensors
        parts = ctx.sizes.blocks
        x_grad, dt_grad, start_grad = x.new_empty(x.shape), torch.empty_like(dt), torch.empty_like(start)
        a_grad = a.new_empty(len(x), len(a))
        b_grad, c_grad = b.new_empty(parts, *b.shape), c.new_empty(parts, *c.shape)
        grads = (x_grad, dt_grad, a_grad, b_grad, c_grad, start_grad)
        given = (x, dt, a, b, c, start, documents, grad_y.contiguous(), grad_end.contiguous())
        _call("ssd_backward", ctx.sizes, *given, *grads)
        return x_grad, dt_grad, *(_sum(part) for part in (a_grad, b_grad, c_grad)), start_grad, None


class CompiledUnit(torch.autograd.Function):
    """x [b, s, h, k], each head divided by its length, of which `eps` is added to the square; the first `scaled` heads
    times `scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, scaled: int, scale: float) -> Tensor:
        x, y = _in_rows(x), x.new_empty(x.shape)
        ctx.sizes = UnitSizes(*x.shape, *x.stride()[:2], scaled, torch.get_num_threads())
        ctx.factors = ctypes.c_double(eps), ctypes.c_double(scale)
        _call("unit_forward", ctx.sizes, x, *ctx.factors, y)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        x_grad = x.new_empty(x.shape)
        _call("unit_backward", ctx.sizes, x, *ctx.factors, grad.contiguous(), x_grad)
        return x_grad, None, None, None


class CompiledDelta(torch.autograd.Function):
    """Arguments and results of `zoo.blocks.delta_rule.delta_chunks`, without its chunk size; log_decay is [b, s, h]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        start: Tensor,
        documents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_in_rows(part) for part in (q, k, v))
        log_decay, beta, start = log_decay.contiguous(), beta.contiguous(), start.contiguous()
        documents, (batch, s, heads, v_dim) = _whole(documents), v.shape
        strides = (stride for part in (q, k, v) for stride in part.stride()[:2])
        sizes = (batch, s, heads, *q.shape[2:], v_dim, min(CHUNK, s), *strides)
        ctx.sizes = DeltaSizes(*sizes, torch.get_num_threads())
        y, end = v.new_empty(v.shape), torch.empty_like(start)
        _call("delta_forward", ctx.sizes, q, k, v, log_decay, beta, start, documents, y, end)
        ctx.save_for_backward(q, k, v, log_decay, beta, start, documents)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_end: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        grads = [part.new_empty(part.shape) for part in given[:6]]
        _call("delta_backward", ctx.sizes, *given, grad_y.contiguous(), grad_end.contiguous(), *grads)
        return *grads, None


def _sum(parts: Tensor) -> Tensor:
    """Over the first axis; a view where there is one part."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _in_rows(x: Tensor) -> Tensor:
    """x [b, s, h, k] with all numbers of a token side by side; a copy only where they are not."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def _whole(documents: Tensor | None) -> Tensor | None:
    return None if documents is None else documents.to(torch.int64).contiguous()


def _call(name: str, sizes: Structure, *given: Tensor | ctypes.c_double | None) -> None:
    """Call a kernel with its sizes and the addresses of its tensors."""
    kernels = library()
    assert kernels is not None
    arguments = [
        ctypes.c_void_p(part.data_ptr()) if isinstance(part, Tensor) else ctypes.c_void_p() if part is None else part
        for part in given
    ]
    getattr(kernels, name)(ctypes.byref(sizes), *arguments)
