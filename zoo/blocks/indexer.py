"""Indexers: side branches that choose which earlier keys a query attends to. No gradient passes through a choice."""

from __future__ import annotations

import torch
from einops import einsum, repeat
from torch import Tensor, nn

from zoo.blocks.base import Context, Linear
from zoo.blocks.norm import Norm
from zoo.blocks.rope import all_positions, turn
from zoo.spec.indexer import BlockIndexerSpec, IndexerSpec
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


class BlockIndexer(nn.Module):
    """Scores every earlier key with a few heads, a block of keys by its best, and chooses the best blocks.

    Blocks are counted from the start of a token's own sequence: padding and earlier documents do not move them.
    """

    def __init__(
        self, spec: BlockIndexerSpec, d_model: int, norm: NormSpec, rope: RopeSpec | None, rotary_dim: int
    ) -> None:
        """
        Args:
            norm: of queries and keys, head by head.
            rope: of the attention, with as many channels that turn.
        """
        super().__init__()
        self.spec, self.rope, self.rotary_dim = spec, rope, rotary_dim
        self.rests_until = spec.block_size * spec.top_k
        """The most keys among which there is nothing to choose."""
        self.q = Linear(d_model, spec.num_heads * spec.head_dim)
        self.k = Linear(d_model, spec.head_dim)
        self.q_norm, self.k_norm = Norm(spec.head_dim, norm), Norm(spec.head_dim, norm)

    @torch.no_grad()
    def keys(self, x: Tensor, context: Context, remembering: bool) -> list[Tensor]:
        """Index keys [b, s, head_dim] of the block's input x [b, s, d_model], at their positions.

        None at all if there is nothing to choose and, not `remembering`, never will be.
        """
        if not remembering and x.shape[1] <= self.rests_until:
            return []
        return [self._turn(self.k_norm(self.k(x))[:, :, None], context)[:, :, 0]]

    @torch.no_grad()
    def restrict(self, x: Tensor, keys: Tensor, mask: Tensor | None, context: Context, num_heads: int) -> Tensor:
        """[b, num_heads, s, n] bool: what is left of `mask` in the chosen blocks.

        Args:
            x: the block's input [b, s, d_model].
            keys: index keys [b, n, head_dim] with n above `rests_until`.
            mask: [b or 1, 1, s, n] as `visible_keys` gives it.
        """
        spec, num_keys = self.spec, keys.shape[1]
        seen = causal(context, num_keys) if mask is None else mask
        q = self._turn(self.q_norm(self.q(x).unflatten(-1, (spec.num_heads, -1))), context)
        with torch.autocast(x.device.type, enabled=False):
            scores = einsum(q.to(torch.float32), keys.to(torch.float32), "b s h k, b n k -> b h s n")
        scores = scores.masked_fill(~seen, -torch.inf)
        places = context.positions if num_keys == x.shape[1] else all_positions(context, num_keys)
        block_of = (places // spec.block_size)[:, None, None].expand_as(scores)
        num_blocks = -(-num_keys // spec.block_size)
        best = scores.new_full((*scores.shape[:-1], num_blocks), -torch.inf)
        best.scatter_reduce_(-1, block_of, scores, "amax")
        local = context.positions[..., None] // spec.block_size - torch.arange(spec.num_local, device=x.device)
        local = local.clamp_min(0)[:, None].expand(*best.shape[:-1], -1)
        chosen = best.scatter_(-1, local, torch.inf).topk(spec.top_k, -1).indices
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, chosen, True).gather(-1, block_of)
        return repeat(kept & seen, "b h s n -> b (h r) s n", r=num_heads // spec.num_heads)

    def _turn(self, x: Tensor, context: Context) -> Tensor:
        return x if self.rope is None else turn(x, self.rope, self.rotary_dim, context)


def causal(context: Context, num_keys: int) -> Tensor:
    """[1, 1, s, n] bool: what the absence of a mask means, every key up to the query."""
    num_queries, device = context.positions.shape[1], context.positions.device

    def make() -> Tensor:
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
        return seen.tril(num_keys - num_queries)[None, None]

    return context.once(("causal", num_queries, num_keys), make)
