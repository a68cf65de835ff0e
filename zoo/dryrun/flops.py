"""FLOPs of operations, and which of them a fusing kernel can take in."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

_FUSABLE = {
    "sum", "mean", "amax", "amin", "cumsum", "logsumexp", "norm", "var_mean", "_softmax", "_softmax_backward_data",
    "_log_softmax", "_log_softmax_backward_data", "_to_copy", "clone", "cat", "stack", "flip", "repeat", "roll",
    "constant_pad_nd", "native_layer_norm", "native_layer_norm_backward", "_fused_rms_norm",
    "_fused_rms_norm_backward", "silu_backward", "gelu_backward", "sigmoid_backward", "tanh_backward",
    "threshold_backward", "softplus_backward", "slice_backward", "select_backward", "expand", "masked_fill", "triu",
    "tril", "gather", "scatter", "scatter_add", "copy", "_unsafe_view", "fill", "zero",
}  # fmt: skip
"""Beside what torch itself calls pointwise."""


@cache
def is_fusable(func: Any) -> bool:
    """Whether an operation goes entry by entry, or along rows, so that a kernel around it can do it on the way."""
    name = func._schema.name.split("::")[-1].rstrip("_")
    return torch.Tag.pointwise in func.tags or name in _FUSABLE


@cache
def reads(func: Any) -> bool:
    """Whether an operation looks at numbers; one that takes memory of a tensor's shape does not."""
    name = func._schema.name.split("::")[-1]
    return not name.startswith("new_") and not name.endswith("_like")


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Of a matrix product; a multiply-add counts 2. Everything else counts nothing."""
    packet = func._overloadpacket
    if packet in _PRODUCTS:
        return int(flop_registry[packet](*args, **{**kwargs, "out_val": result}))
    return 0


_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
