"""The experts' fastest path on a CPU: one call of a compiled kernel for all of them, where the kernels are at hand."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from zoo.native.library import is_loaded, library
from zoo.spec.base import ConfigError
from zoo.spec.mlp import ActivationSpec

if TYPE_CHECKING:
    from zoo.blocks.grouped import ExpertWeights

_WHOLE = 16
"""Numbers in the widest vector register: widths are multiples."""
_UNEVEN = 1.5
"""The gradients of an expert are one thread's work: its rows over those of an even share among the threads."""


def fits(x: Tensor, weights: ExpertWeights, spec: ActivationSpec) -> bool:
    """Whether the kernel computes this: gated silu experts in fp32 on a CPU, all numbers there and side by side."""
    plain = spec.activation == "silu" and spec.gated and not spec.bias
    parts = (x, weights.first, weights.down)
    return (
        plain
        and all(part.device.type == "cpu" and part.dtype == torch.float32 for part in parts)
        and weights.first.is_contiguous()
        and weights.down.is_contiguous()
        and all(width % _WHOLE == 0 for width in weights.down.shape[1:])
    )


_preferred = True


def prefer(wanted: bool) -> None:
    """Whether what is chosen automatically may be the compiled experts, in this process."""
    global _preferred
    _preferred = wanted


def is_ready() -> bool:
    """Whether the kernels are compiled and loaded, and nobody watches what torch does (a trace, a counter of FLOPs)."""
    return _preferred and not torch.compiler.is_compiling() and is_loaded() and not is_in_torch_dispatch_mode()


class Sorted(NamedTuple):
    """Choices [t, c] in the order of their experts; those of an expert in the order of the tokens."""

    order: Tensor
    """[t * c] int64: for each place, which of the flattened choices is there."""
    bounds: Tensor
    """[e + 1] int64: where the places of each expert start, and their number."""
    longest: int
    """The most places that an expert has."""

    @classmethod
    def of(cls, indices: Tensor, num_experts: int) -> Sorted:
        """Sort indices [t, c] int64 on a CPU by counting."""
        choices = indices.contiguous()
        order, bounds = torch.empty_like(choices).flatten(), choices.new_empty(num_experts + 1)
        longest = _call("experts_sort", (choices, order, bounds), (choices.numel(), num_experts))
        if longest < 0:
            raise IndexError(f"experts: a choice is none of the {num_experts} experts")
        return cls(order, bounds, longest)

    def is_even(self) -> bool:
        """Whether threads that take whole experts end together."""
        return self.longest * torch.get_num_threads() <= _UNEVEN * max(_WHOLE, self.order.numel())


def compiled_experts(
    x: Tensor,
    scale: Tensor | None,
    indices: Tensor,
    weights: ExpertWeights,
    spec: ActivationSpec,
    recompute: bool = False,
    found: Sorted | None = None,
) -> Tensor:
    """The weighted sum of the chosen experts' outputs: arguments and result as of `zoo.blocks.grouped.grouped_experts`.

    Kept for the backward pass, n = t * c choices: x, scale and the weights themselves, the order [n] int64, and unless
    `recompute` the first product [n, 2f]. Taken meanwhile: [threads, t, d] or [n, d], whichever is less.

    Args:
        found: the choices sorted, if they are.

    Raises:
        ConfigError: the kernel does not compute this, or cannot be had.
    """
    if not fits(x, weights, spec):
        raise ConfigError("experts: compiled needs gated silu experts without biases, fp32, widths in multiples of 16")
    if library() is None:
        raise ConfigError("experts: compiled needs a C++ compiler; use auto, grouped or grouped_mm")
    order, bounds, _ = found or Sorted.of(indices, len(weights.down))
    inputs = (x, scale, weights.first, weights.down)
    needs_grad = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in inputs)
    keep = needs_grad and not recompute
    result: Tensor = _CompiledExperts.apply(*inputs, order, bounds, indices.shape[1], keep)
    return result


class _CompiledExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        first: Tensor,
        down: Tensor,
        order: Tensor,
        bounds: Tensor,
        top_k: int,
        keep: bool,
    ) -> Tensor:
        x = x.contiguous()
        factors = _factors(scale)
        hidden = x.new_empty(order.numel(), first.shape[1]) if keep else None
        parts, result = _parts(x, top_k), torch.empty_like(x)
        tensors = (x, factors, order, bounds, first, down, hidden, parts, result)
        _call("experts_forward", tensors, (*down.shape, len(x), top_k), torch.get_num_threads())
        ctx.save_for_backward(x, scale, first, down, order, bounds, hidden)
        ctx.top_k = top_k
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, first, down, order, bounds, hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        x_grad, first_grad, down_grad = (
            torch.empty_like(part) if needed else None
            for part, needed in zip((x, first, down), (needs[0], *needs[2:]), strict=True)
        )
        factors, grad = _factors(scale), grad.contiguous()
        scale_grad = torch.empty_like(factors) if needs[1] and factors is not None else None
        parts = _parts(x, ctx.top_k) if needs[0] else None
        tensors = (
            x,
            grad,
            factors,
            order,
            bounds,
            first,
            down,
            hidden,
            parts,
            x_grad,
            scale_grad,
            first_grad,
            down_grad,
        )
        _call("experts_backward", tensors, (*down.shape, len(x), ctx.top_k), torch.get_num_threads())
        if scale_grad is not None and scale is not None:
            scale_grad = scale_grad.to(scale.dtype)
        return x_grad, scale_grad, first_grad, down_grad, None, None, None, None


def _factors(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.to(torch.float32).contiguous()


def _parts(x: Tensor, top_k: int) -> Tensor:
    """Room for sums that are not finished: one for each thread, or one for each choice."""
    return x.new_empty(min(torch.get_num_threads(), top_k), *x.shape)


def _call(name: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], threads: int | None = None) -> int:
    """Call a kernel of experts.cpp: the addresses of `tensors`, the sizes, the number of threads."""
    kernels = library()
    assert kernels is not None
    addresses = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    numbers = [ctypes.c_long(size) for size in sizes]
    result: int = getattr(kernels, name)(*addresses, *numbers, *([] if threads is None else [ctypes.c_int(threads)]))
    return result
