"""How evenly a router spreads its choices: counts, and the losses that even them out."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.blocks.base import Context
from zoo.blocks.router import Routing


def count_choices(indices: Tensor, num_experts: int, valid: Tensor | None = None) -> Tensor:
    """How often each expert was chosen, by row: indices [r, s, c] int64, valid [r, s] bool or None -> [r, e] int64."""
    ones = torch.ones_like(indices) if valid is None else valid[..., None].to(torch.int64).expand_as(indices)
    counts = torch.zeros(len(indices), num_experts, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(1, indices.flatten(1), ones.flatten(1))


def balance_loss(routing: Routing, level: str, valid: Tensor | None = None) -> Tensor:
    """e * sum_i f_i P_i: f_i the share of choices that go to expert i, P_i its mean share of a token's scores.

    1 when the choices or the scores are spread evenly, e / c when all tokens want and get the same c experts.

    Args:
        routing: of tokens [r, s].
        level: `batch`: f and P over all tokens, f of the choices made (arXiv:2101.03961, equations 4 to 6).
            `sequence`: in each row by itself, then the mean over the rows that have a valid token; f of the choices
            that the scores alone would make (arXiv:2412.19437, equations 17 to 20).
        valid: [r, s] bool, the tokens that count; None: all.

    Returns:
        A scalar, fp32. The gradient flows through P.
    """
    scores = routing.scores
    num_choices, num_experts = routing.indices.shape[-1], scores.shape[-1]
    indices = routing.indices if level == "batch" else scores.detach().topk(num_choices, dim=-1).indices
    counts = count_choices(indices, num_experts, valid)
    shares = scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    if valid is not None:
        shares = shares * valid[..., None]
    summed = shares.sum(1)
    if level == "batch":
        counts, summed = counts.sum(0, keepdim=True), summed.sum(0, keepdim=True)
    num_tokens = counts.sum(-1, keepdim=True) // num_choices
    per_token = 1 / num_tokens.clamp_min(1)
    by_row = num_experts * (counts * per_token / num_choices * (summed * per_token)).sum(-1)
    return by_row.sum() / (num_tokens > 0).sum().clamp_min(1)


def z_loss(routing: Routing, valid: Tensor | None = None) -> Tensor:
    """mean(logsumexp(logits) ** 2) over the tokens that count (arXiv:2202.08906, equation 5): a scalar, fp32."""
    squares = routing.logits.logsumexp(-1).square()
    if valid is None:
        return squares.mean()
    return (squares * valid).sum() / valid.sum().clamp_min(1)


def valid_tokens(context: Context | None, seq_len: int) -> Tensor | None:
    """[b, s] bool: the tokens of this pass that are no padding; None: all."""
    if context is None or context.padding is None:
        return None
    padding = context.padding

    def make() -> Tensor:
        slots = torch.arange(context.past, context.past + seq_len, device=padding.device)
        return slots >= padding[:, None]

    return context.once(("valid_tokens", seq_len), make)
