"""How evenly a router spreads its choices: counts, and the losses that even them out."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.blocks.base import Context, Peers
from zoo.blocks.router import Routing


def count_choices(indices: Tensor, num_experts: int, valid: Tensor | None = None) -> Tensor:
    """How often each expert was chosen, by row: indices [r, s, c] int64, valid [r, s] bool or None -> [r, e] int64."""
    ones = torch.ones_like(indices) if valid is None else valid[..., None].to(torch.int64).expand_as(indices)
    counts = torch.zeros(len(indices), num_experts, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(1, indices.flatten(1), ones.flatten(1))


def balance_loss(routing: Routing, level: str, valid: Tensor | None = None, peers: Peers | None = None) -> Tensor:
    """e * sum_i f_i P_i: f_i the share of choices that go to expert i, P_i its mean share of a token's scores.

    1 when the choices or the scores are spread evenly, e / c when all tokens want and get the same c experts.

    Args:
        routing: of tokens [r, s].
        level: `batch`: f and P over all tokens, f of the choices made (arXiv:2101.03961, equations 4 to 6).
            `sequence`: in each row by itself, then the mean over the rows that have a valid token; f of the choices
            that the scores alone would make (arXiv:2412.19437, equations 17 to 20).
        valid: [r, s] bool, the tokens that count; None: all.
        peers: who holds the rest of the batch.

    Returns:
        A scalar, fp32, or the part of it that is these tokens'. The gradient flows through P.
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
        counts = _everywhere(counts, peers)
    elif peers is not None:
        counts = peers.sum_within_rows(counts)
    num_tokens = counts.sum(-1, keepdim=True) // num_choices
    per_token = 1 / num_tokens.clamp_min(1)
    by_row = num_experts * (counts * per_token / num_choices * (summed * per_token)).sum(-1)
    num_rows = (num_tokens > 0).sum()
    if peers is not None and level == "sequence":
        num_rows = peers.sum_over_rows(num_rows)
    return by_row.sum() / num_rows.clamp_min(1)


def z_loss(routing: Routing, valid: Tensor | None = None, peers: Peers | None = None) -> Tensor:
    """mean(logsumexp(logits) ** 2) over the tokens that count (arXiv:2202.08906, equation 5): a scalar, fp32.

    With peers, the part of it that is these tokens'.
    """
    squares = routing.logits.logsumexp(-1).square()
    if valid is None and peers is None:
        return squares.mean()
    valid = torch.ones_like(squares, dtype=torch.bool) if valid is None else valid
    return (squares * valid).sum() / _everywhere(valid.sum(), peers).clamp_min(1)


def _everywhere(counts: Tensor, peers: Peers | None) -> Tensor:
    return counts if peers is None else peers.sum_over_rows(peers.sum_within_rows(counts))


def valid_tokens(context: Context | None, seq_len: int) -> Tensor | None:
    """[b, s] bool: the tokens of this pass that are no padding; None: all."""
    if context is None or context.padding is None:
        return None
    padding = context.padding

    def make() -> Tensor:
        slots = torch.arange(context.past, context.past + seq_len, device=padding.device)
        return slots >= padding[:, None]

    return context.once(("valid_tokens", seq_len), make)
