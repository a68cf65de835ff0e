"""Which rows go to which expert: choices sorted by expert, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Dispatch(NamedTuple):
    """The choices of t tokens, n = t * c rows, in the order of their experts; equal experts keep the tokens' order."""

    order: Tensor
    """[n] int64: for each row, its place in the flattened choices [t * c]."""
    token: Tensor
    """[n] int64: for each row, its token."""
    row: Tensor
    """[t, c] int64: for each choice, its row."""
    ends: Tensor
    """[e] int32: where the rows of each expert end."""

    @classmethod
    def of(cls, indices: Tensor, num_experts: int) -> Dispatch:
        """Sort the choices indices [t, c] int64. Nothing waits for the device."""
        flat = indices.flatten()
        # Radix sort takes one pass for each byte.
        narrow = flat.to(torch.uint8 if num_experts <= 256 else torch.int32)
        experts, order = narrow.sort(stable=True)
        row = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        each = torch.arange(num_experts, device=order.device, dtype=experts.dtype)
        ends = torch.searchsorted(experts, each, right=True, out_int32=True)
        return cls(order, order // indices.shape[1], row.view_as(indices), ends)

    def bounds(self) -> list[int]:
        """Where the rows of each expert start, and the number of rows. Waits for the device.

        On the meta device, which knows no numbers, all rows are the first expert's: shapes and FLOPs are the same.
        """
        if self.ends.is_meta:
            return [0, *([self.order.numel()] * self.ends.numel())]
        return [0, *self.ends.tolist()]


def sum_rows(rows: Tensor, row: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum the rows of each token: rows [n, d], row [t, c] int64, weights [t, c] of the rows' dtype or None -> [t, d].

    The fastest sum on a CPU, and one without atomics, so equal inputs give equal bits.
    """
    return F.embedding_bag(row, rows, per_sample_weights=weights, mode="sum")


def gather(x: Tensor, dispatch: Dispatch) -> Tensor:
    """The rows [n, d] of the tokens x [t, d]. Differentiable; the gradient is a `sum_rows`."""
    rows: Tensor = _Gather.apply(x, dispatch)
    return rows


def combine(rows: Tensor, weights: Tensor | None, dispatch: Dispatch) -> Tensor:
    """`sum_rows` of rows [n, d], weights [t, c] of any floating dtype. Differentiable; the gradients are gathered."""
    result: Tensor = _Combine.apply(rows, weights, dispatch)
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.save_for_backward(dispatch.row)
        return x.index_select(0, dispatch.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_rows(grad.contiguous(), *ctx.saved_tensors), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor | None, dispatch: Dispatch) -> Tensor:
        ctx.save_for_backward(None if weights is None else rows, weights, *dispatch)
        return sum_rows(rows, dispatch.row, None if weights is None else weights.to(rows.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, *parts = ctx.saved_tensors
        dispatch = Dispatch(*parts)
        spread = grad.index_select(0, dispatch.token)
        if weights is None:
            return spread, None, None
        of_row = (spread * rows).sum(-1, dtype=torch.promote_types(rows.dtype, torch.float32))
        scale = weights.flatten()[dispatch.order, None].to(grad.dtype)
        return spread * scale, of_row[dispatch.row].to(weights.dtype), None
