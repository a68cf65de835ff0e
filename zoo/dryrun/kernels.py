"""What runs on a GPU as one kernel, told to the meter as one: attention, scans, and the order of rows at experts.

These replace parts of blocks while a step is rehearsed. Tensors hold no values there, so that shapes are all there is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor._sharding_prop import ShardingPropagator

from zoo.blocks import conv, delta_rule, selective_scan, ssd
from zoo.blocks.base import Context
from zoo.blocks.dispatch import Dispatch, sum_rows
from zoo.dryrun import ledger
from zoo.dryrun.meter import Meter

SCANS = (
    (conv, "_Convolution"),
    (ssd, "_SSD"),
    (selective_scan, "_Recurrence"),
    (delta_rule, "_ChannelPairs"),
    (delta_rule, "_UnitInverse"),
    (delta_rule, "_Scan"),
)
"""Functions that a GPU has as one kernel forward and one backward, from convolution to gated norm."""
GATHERS, SCATTERS = ("unshard", "wait_for_unshard"), ("post_backward", "finalize_backward")


@contextmanager
def gpu_kernels(meter: Meter) -> Iterator[None]:
    """Within, blocks run as they do on a GPU, and `meter` is told what storages are for."""
    with ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            if name in owner.__dict__:
                stack.callback(setattr, owner, name, owner.__dict__[name])
            else:
                stack.callback(delattr, owner, name)
            setattr(owner, name, value)

        put(F, "scaled_dot_product_attention", _attention(meter))
        put(F, "grouped_mm", _grouped(meter))
        put(ssd, "CACHED_ELEMENTS", 2**62)  # a GPU takes all chunks at once
        for module, name in SCANS:
            function = getattr(module, name)
            put(function, "forward", staticmethod(_scan_forward(meter, function.forward)))
            put(function, "backward", staticmethod(_scan_backward(meter, function.backward)))
        if meter.fused:
            for path in ("zoo.blocks.experts", "zoo.parallel.experts"):
                put(importlib.import_module(path), "combine", _combine)
        for names, kind in ((GATHERS, ledger.WEIGHTS), (SCATTERS, ledger.GRADIENTS)):
            for name in names:
                put(FSDPParamGroup, name, _labelled(meter, getattr(FSDPParamGroup, name), kind))
        put(ShardingPropagator, "_propagate_tensor_meta_non_cached", _unwatched(meter))
        put(torch.UntypedStorage, "resize_", _resize(meter))
        put(Context, "_recompute", _recompute(meter))
        yield


def _attention(meter: Meter) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """`F.scaled_dot_product_attention`, as flash attention keeps and counts it: all pairs, masked ones too."""
        del options
        result: Tensor = _Attention.apply(q, k, v, mask, meter)
        return result

    return attend


class _Attention(torch.autograd.Function):
    """Keeps its arguments, its result and a number for each query and head (arXiv:2307.08691)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, meter: Meter) -> Tensor:
        batch, heads, length, width = q.shape
        ctx.meter, ctx.flops = meter, 2 * batch * heads * length * k.shape[2] * (width + v.shape[3])
        meter.segment.flops[meter.phase] += ctx.flops
        meter.written(q, k, v)
        y = q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)
        sums = q.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, y, sums)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        ctx.meter.segment.flops[ctx.meter.phase] += 2 * ctx.flops
        ctx.meter.written(q, k, v, grad)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


def _grouped(meter: Meter) -> Callable[..., Tensor]:
    def multiply(rows: Tensor, stack: Tensor, *, offs: Tensor) -> Tensor:
        """`F.grouped_mm` of rows [n, i] with matrices [e, i, o]: [n, o]."""
        del offs
        result: Tensor = _GroupedProduct.apply(rows, stack, meter)
        return result

    return multiply


class _GroupedProduct(torch.autograd.Function):
    """Of any dtype; torch's own shape rule knows bf16 alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, stack: Tensor, meter: Meter) -> Tensor:
        ctx.meter, ctx.flops = meter, 2 * rows.numel() * stack.shape[2]
        meter.segment.flops[meter.phase] += ctx.flops
        meter.written(rows, stack)
        ctx.save_for_backward(rows, stack)
        return rows.new_empty(len(rows), stack.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, stack = ctx.saved_tensors
        ctx.meter.segment.flops[ctx.meter.phase] += 2 * ctx.flops
        ctx.meter.written(rows, stack, grad)
        return torch.empty_like(rows), torch.empty_like(stack), None


def _scan_forward(meter: Meter, compute: Callable[..., Any]) -> Callable[..., Any]:
    def forward(ctx: Any, *args: Any) -> Any:
        with meter.kernel(args) as inside:
            result = compute(ctx, *args)
        ctx.products = sum(inside.flops.values())
        meter.segment.flops[meter.phase] += ctx.products
        return result

    return forward


def _scan_backward(meter: Meter, compute: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        with meter.kernel(grads):  # what is saved can be read only once
            result = compute(ctx, *grads)
        # Every product needs two of its size; what a scan computes again on its way is its own affair.
        meter.segment.flops[meter.phase] += 2 * ctx.products
        return result

    return backward


def _combine(rows: Tensor, weights: Tensor | None, dispatch: Dispatch) -> Tensor:
    """`zoo.blocks.dispatch.combine` where experts have taken their weights in before their last product."""
    result: Tensor = _Combine.apply(rows, weights, dispatch)
    return result


class _Combine(torch.autograd.Function):
    """Keeps no outputs of experts: Megatron-Core weighs their activations, so that these give the gradients too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor | None, dispatch: Dispatch) -> Tensor:
        ctx.save_for_backward(weights, dispatch.token, dispatch.order)
        return sum_rows(rows, dispatch.row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, token, _ = ctx.saved_tensors
        return grad.index_select(0, token), None if weights is None else torch.empty_like(weights), None


def _labelled(meter: Meter, compute: Callable[..., Any], kind: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with meter.label(kind):
            return compute(*args, **kwargs)

    return call


def _unwatched(meter: Meter) -> Callable[..., Any]:
    """DTensor finds shapes out on fake tensors of whole shapes, which nobody would ever hold."""
    compute = ShardingPropagator._propagate_tensor_meta_non_cached

    def call(*args: Any, **kwargs: Any) -> Any:
        with meter.unwatched():
            return compute(*args, **kwargs)

    return call


def _resize(meter: Meter) -> Callable[..., Any]:
    """`fully_shard` takes memory and gives it back by the size of storages, past any operation."""
    compute = torch.UntypedStorage.resize_

    def resize_(store: torch.UntypedStorage, nbytes: int) -> Any:
        meter.resized(store, nbytes)
        return compute(store, nbytes)

    return resize_


def _recompute(meter: Meter) -> Callable[..., Any]:
    compute = Context._recompute

    @contextmanager
    def again(context: Context) -> Iterator[None]:
        before, meter.phase = meter.phase, "again"
        try:
            with compute(context):
                yield
        finally:
            meter.phase = before

    return again


def label_logits(head: nn.Module, meter: Meter) -> None:
    """Let `meter` know what a head takes memory for."""
    compute: Callable[..., Tensor] = head.cross_entropy  # type: ignore[assignment]
    head.cross_entropy = _labelled(meter, compute, ledger.LOGITS)  # type: ignore[assignment]
