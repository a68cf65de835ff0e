"""The cost of indexers, and of attention to what they choose."""

from __future__ import annotations

from zoo.plan.attention import visible_pairs
from zoo.plan.base import Weight, linear
from zoo.plan.norm import norm_weights
from zoo.spec.indexer import IndexerSpec
from zoo.spec.norm import NormSpec

PART = "indexer"


def indexer_weights(spec: IndexerSpec, d_model: int, d_query: int) -> list[Weight]:
    """The weights of an indexer whose queries are projected from `d_query` channels."""
    weights = linear("q", d_query, spec.num_heads * spec.head_dim)
    weights += linear("k", d_model, spec.head_dim)
    weights += norm_weights("k_norm", spec.head_dim, NormSpec(type="layer", bias=True))
    weights += linear("weights", d_model, spec.num_heads)
    return [weight.under("indexer", PART) for weight in weights]


def indexer_mixing(spec: IndexerSpec, seq_len: int, skip_masked: bool) -> float:
    """Forward FLOPs of one token in its scores with the keys before it: head by head, then their weighted sum."""
    pairs = visible_pairs(seq_len) if skip_masked else seq_len**2
    return 2 * spec.num_heads * (spec.head_dim + 1) * pairs / seq_len
