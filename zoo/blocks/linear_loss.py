"""The output matrix and the cross-entropy in one, so that the logits of a batch are never in memory together."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.blocks.autocast import autocast_dtype, without_autocast
from zoo.blocks.compiled_mixers import fits
from zoo.blocks.compiled_trunk import cross_entropy_

IGNORED = -100
"""The target that does not count."""
CHUNK_NUMBERS = 2**24
"""Logits that are in memory at a time: 64 MiB in fp32."""


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
    gradients alone, as large as x and the weights. The backward pass hands them on, and can be taken once.

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
    settings = (scale, softcap, chunk_rows(len(x), len(weight), chunk_numbers), torch.is_grad_enabled())
    with without_autocast(x.device):
        result: Tensor = _LinearCrossEntropy.apply(x, weight, targets, bias, *settings)
    return result


def chunk_rows(num_tokens: int, vocab_size: int, chunk_numbers: int = CHUNK_NUMBERS) -> int:
    """Tokens of a chunk: as many as have room, and as many in each."""
    most = max(1, chunk_numbers // vocab_size)
    return max(1, math.ceil(num_tokens / math.ceil(num_tokens / most))) if num_tokens else 1


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
            logits = grad = None  # gone before there are others
            logits = (x[rows] @ w.t()).to(wide)
            if b is not None:
                logits += b
            loss, grad = _loss_and_grad(logits, targets[rows], scale, softcap, any(needs))
            total += loss
            if grad is None:
                continue
            if bias_grad is not None:
                bias_grad += grad.sum(0)
            grad = grad.to(x.dtype)
            if x_grad is not None:
                torch.mm(grad, w, out=x_grad[rows])
            if weight_grad is not None and weight_grad.dtype == x.dtype:
                torch.addmm(weight_grad, grad.t(), x[rows], out=weight_grad)  # in the form that FLOP counters know
            elif weight_grad is not None:
                weight_grad += grad.t() @ x[rows]
        # Scaled in place and given away: a weight's gradient is then the one that was made here.
        ctx.grads = x_grad, weight_grad, bias_grad
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("linear_cross_entropy: the backward pass was taken before")
        (x_grad, weight_grad, bias_grad), ctx.grads = ctx.grads, None
        weight_dtype, bias_dtype = ctx.dtypes
        x_grad = None if x_grad is None else x_grad.mul_(grad.to(x_grad.dtype))
        weight_grad = None if weight_grad is None else weight_grad.mul_(grad).to(weight_dtype)
        bias_grad = None if bias_grad is None else bias_grad.mul_(grad).to(bias_dtype)
        return x_grad, weight_grad, None, bias_grad, None, None, None, None


def shaped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits after their factor and their soft cap, if there are any."""
    if scale != 1:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _loss_and_grad(
    logits: Tensor, targets: Tensor, scale: float, softcap: float | None, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The summed cross-entropy of logits [t, v] before scale and softcap, which are given away, and their gradient."""
    if scale == 1 and softcap is None and with_grad and fits(logits):
        return cross_entropy_(logits, targets).sum(), logits
    capped = shaped(logits, scale, softcap)
    log_probs = F.log_softmax(capped, -1)
    loss = F.nll_loss(log_probs, targets, ignore_index=IGNORED, reduction="sum")
    if not with_grad:
        return loss, None
    grad = log_probs.exp_()
    places = targets.clamp_min(0)[:, None]
    grad.scatter_add_(1, places, torch.full_like(places, -1, dtype=grad.dtype))
    grad *= (targets != IGNORED)[:, None]
    if softcap is not None:
        grad *= 1 - (capped / softcap).square()
    return loss, grad if scale == 1 else grad.mul_(scale)
