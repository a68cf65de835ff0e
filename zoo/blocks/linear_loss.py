"""The output matrix and the cross-entropy in one, so that the logits of a batch are never in memory together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.blocks.autocast import autocast_dtype, without_autocast

IGNORED = -100
"""The target that does not count."""
CHUNK_NUMBERS = 2**23
"""Logits that are in memory at a time: 32 MiB in fp32."""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_numbers: int = CHUNK_NUMBERS,
) -> Tensor:
    """The summed cross-entropy of the logits softcap * tanh(scale * (x W^T + bias) / softcap).

    Both gradients are made in the forward pass, chunk by chunk, so each chunk's logits are computed once; kept are the
    gradients alone, as large as x and the weights.

    Args:
        x: [t, d], the hidden states.
        weight: [v, d], the output matrix.
        targets: [t] int64; IGNORED does not count.
        bias: [v] or None.
        chunk_numbers: most logits that are in memory at a time.

    Returns:
        A scalar, fp32 at least.
    """
    x = x.to(autocast_dtype(x))
    settings = (scale, softcap, max(1, chunk_numbers // len(weight)), torch.is_grad_enabled())
    with without_autocast(x.device):
        result: Tensor = _LinearCrossEntropy.apply(x, weight, targets, bias, *settings)
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        chunk_len: int,
        with_grad: bool,
    ) -> Tensor:
        needs = [with_grad and ctx.needs_input_grad[place] for place in (0, 1, 3)]
        wide = torch.promote_types(x.dtype, torch.float32)
        w, b = weight.to(x.dtype), None if bias is None else bias.to(wide)
        total = torch.zeros((), dtype=wide, device=x.device)
        x_grad = torch.empty_like(x) if needs[0] else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        bias_grad = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None
        for start in range(0, len(x), chunk_len):
            rows = slice(start, start + chunk_len)
            logits = (x[rows] @ w.t()).to(wide)
            if b is not None:
                logits += b
            capped = shaped(logits, scale, softcap)
            total += F.cross_entropy(capped, targets[rows], ignore_index=IGNORED, reduction="sum")
            if not any(needs):
                continue
            grad = _logit_grad(capped, targets[rows], scale, softcap)
            if bias_grad is not None:
                bias_grad += grad.sum(0)
            grad = grad.to(x.dtype)
            if x_grad is not None:
                torch.mm(grad, w, out=x_grad[rows])
            if weight_grad is not None:
                weight_grad += grad.t() @ x[rows]
        ctx.save_for_backward(x_grad, weight_grad, bias_grad)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, weight_grad, bias_grad = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        x_grad = None if x_grad is None else x_grad * grad.to(x_grad.dtype)
        weight_grad = None if weight_grad is None else (weight_grad * grad).to(weight_dtype)
        bias_grad = None if bias_grad is None else (bias_grad * grad).to(bias_dtype)
        return x_grad, weight_grad, None, bias_grad, None, None, None, None


def shaped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits after their factor and their soft cap, if there are any."""
    if scale != 1:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _logit_grad(capped: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:
    """The gradient of the summed cross-entropy with respect to the logits before scale and softcap [t, v]."""
    counts = targets != IGNORED
    grad = capped.softmax(-1)
    places = targets.clamp_min(0)[:, None]
    grad.scatter_add_(1, places, torch.full_like(places, -1, dtype=grad.dtype))
    grad *= counts[:, None]
    if softcap is not None:
        grad *= 1 - (capped / softcap).square()
    return grad if scale == 1 else grad * scale
