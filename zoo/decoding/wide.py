"""Prompts of models in bf16 on a processor that has no units for it: products are taken in fp32, then rounded."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zoo.native.library import is_loaded, library

_OTHERS = {
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.addmm,
    torch.bmm,
    torch.baddbmm,
    torch.einsum,
    F.scaled_dot_product_attention,
}
_GROUPED = (F.grouped_mm, torch._grouped_mm)


def has_bf16_units() -> bool:
    """Whether the processor multiplies bf16 as fast as fp32."""
    found = torch.cpu.get_capabilities()
    return any(found.get(unit, False) for unit in ("avx512_bf16", "amx_bf16", "bf16"))


def wide_products(x: Tensor) -> AbstractContextManager[Any]:
    """Take products as the dtype and device of `x`, a weight, ask for: in fp32, or as they are."""
    emulated = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not has_bf16_units()
    return WideProducts() if emulated else nullcontext()


class WideProducts(TorchFunctionMode):
    """Products of bf16 matrices on the processor are taken in fp32, and rounded once. Without gradients."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (func is F.linear or func in _OTHERS or func in _GROUPED) or not any(map(_is_narrow, args)):
            return func(*args, **kwargs)
        out = kwargs.get("out")
        result = _weighed(func, args, kwargs) if is_loaded() else None
        if result is None:
            named = {name: _wide(part) for name, part in kwargs.items() if name != "out"}
            result = func(*map(_wide, args), **named)
        return result.to(torch.bfloat16) if out is None else out.copy_(result)


def _is_narrow(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def _wide(x: Any) -> Any:
    return x.to(torch.float32) if _is_narrow(x) else x


def _weighed(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """x W^T + bias by the kernel, fp32, if that is what is asked for: W [n, k] in bf16 and row by row in memory."""
    bias: Any = None
    if func is F.linear:
        x, weight, bias = (*args, kwargs.get("bias"))[:3]
    elif func in (torch.mm, torch.addmm):
        *before, x, turned = args
        weight, bias = turned.t(), before[0] if before else None
    elif func in _GROUPED:
        return _grouped(args[0], args[1].mT, kwargs.get("offs"))
    else:
        return None
    if not (_is_narrow(weight) and weight.ndim == 2 and weight.is_contiguous()):
        return None
    rows = x.reshape(-1, x.shape[-1]).to(torch.float32).contiguous()
    y = torch.empty(len(rows), len(weight))
    _multiply(rows, weight, y)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], len(weight))


def _grouped(x: Tensor, stack: Tensor, ends: Tensor | None) -> Tensor | None:
    """The rows of x [m, k] up to each of `ends` [e] times a matrix of stack [e, n, k]."""
    if ends is None or x.ndim != 2 or not stack.is_contiguous():
        return None
    rows, y = x.to(torch.float32).contiguous(), torch.empty(len(x), stack.shape[1])
    start = 0
    for weight, end in zip(stack, ends.tolist(), strict=True):
        _multiply(rows[start:end], weight, y[start:end])
        start = end
    return y


def _multiply(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """y [m, n] = x [m, k] weight^T, all contiguous."""
    kernels = library()
    assert kernels is not None
    sizes = map(ctypes.c_int64, (len(x), *weight.shape))
    addresses = (ctypes.c_void_p(part.data_ptr()) for part in (x, weight, y))
    kernels.wide_product(*sizes, *addresses, ctypes.c_int64(torch.get_num_threads()))
