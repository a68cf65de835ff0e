"""Indexers: side branches that choose which earlier keys a query attends to. No gradient passes through a choice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.blocks.base import Context, Linear
from zoo.blocks.norm import Norm
from zoo.blocks.rope import turn
from zoo.spec.indexer import IndexerSpec
from zoo.spec.norm import NormSpec
from zoo.spec.rope import RopeSpec

SCORES_AT_ONCE = 2**24
"""Most scores of index heads that are in memory at a time."""


class Indexer(nn.Module):
    """Scores every earlier key with a few narrow heads and chooses the best (arXiv:2512.02556, equation 1).

    The score of key n for query s is sum_h w[s, h] * relu(q[s, h] . k[n] / sqrt(head_dim)) / sqrt(num_heads). All keys
    share one head; the weights w follow from the input. Of equal scores the choice is that of `torch.topk`.
    """

    def __init__(self, spec: IndexerSpec, d_model: int, d_query: int, rope: RopeSpec | None, rotary_dim: int) -> None:
        """
        Args:
            d_query: width of what queries are projected from.
            rope: of the attention; its layout gives way to `spec.rope_layout`.
            rotary_dim: leading channels that turn.
        """
        super().__init__()
        self.spec, self.rope, self.rotary_dim = spec, rope, rotary_dim
        self.q = Linear(d_query, spec.num_heads * spec.head_dim)
        self.k = Linear(d_model, spec.head_dim)
        self.k_norm = Norm(spec.head_dim, NormSpec(type="layer", bias=True, eps=spec.norm_eps))
        self.weights = Linear(d_model, spec.num_heads)

    @torch.no_grad()
    def keys(self, x: Tensor, context: Context) -> Tensor:
        """Index keys [b, s, head_dim] of the block's input x [b, s, d_model], at their positions."""
        return self._turn(self.k_norm(self.k(x))[:, :, None], context)[:, :, 0]

    @torch.no_grad()
    def choose(self, x: Tensor, q_source: Tensor, keys: Tensor, seen: Tensor, context: Context) -> Tensor:
        """[b, s, top_k] int64, the chosen keys; among them are unseen ones where a query sees fewer than top_k.

        Args:
            x: the block's input [b, s, d_model].
            q_source: what queries are projected from [b, s, d_query].
            keys: turned index keys [b, n, head_dim] with n above top_k.
            seen: [b or 1, s, n] bool, the keys that a query may attend to.
        """
        spec = self.spec
        q = self._turn(self.q(q_source).unflatten(-1, (spec.num_heads, -1)), context).to(torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            weights = nn.functional.linear(x.to(wide), self.weights.weight.to(wide)).to(torch.float32)
            weights, keys = weights * spec.num_heads**-0.5, keys.to(torch.float32).mT[:, None]
            rows = max(1, SCORES_AT_ONCE // (x.shape[0] * spec.num_heads * keys.shape[-1]))
            chosen = []
            for some_q, some_weights, some_seen in zip(
                q.split(rows, 1), weights.split(rows, 1), seen.split(rows, 1), strict=True
            ):
                scores = torch.relu(some_q @ keys * spec.head_dim**-0.5)
                total = (some_weights[:, :, None] @ scores)[:, :, 0].masked_fill(~some_seen, -torch.inf)
                chosen.append(total.topk(spec.top_k, -1).indices)
        return torch.cat(chosen, 1)

    def _turn(self, x: Tensor, context: Context) -> Tensor:
        return x if self.rope is None else turn(x, self.rope, self.rotary_dim, context, self.spec.rope_layout)
