"""The cost of indexers."""

from __future__ import annotations

from zoo.plan.base import Weight, linear
from zoo.plan.norm import norm_weights
from zoo.spec.indexer import BlockIndexerSpec, IndexerSpec
from zoo.spec.norm import NormSpec

PART = "indexer"


def indexer_weights(spec: IndexerSpec, d_model: int, d_query: int) -> list[Weight]:
    """The weights of an indexer whose queries are projected from `d_query` channels."""
    weights = linear("q", d_query, spec.num_heads * spec.head_dim)
    weights += linear("k", d_model, spec.head_dim)
    weights += norm_weights("k_norm", spec.head_dim, NormSpec(type="layer", bias=True))
    weights += linear("weights", d_model, spec.num_heads)
    return [weight.under("indexer", PART) for weight in weights]


def indexer_mixing(spec: IndexerSpec, num_keys: float) -> float:
    """Forward FLOPs of one query in its scores with `num_keys` keys: head by head, then their weighted sum."""
    return 2 * spec.num_heads * (spec.head_dim + 1) * num_keys


def block_indexer_weights(spec: BlockIndexerSpec, d_model: int, norm: NormSpec) -> list[Weight]:
    """The weights of an indexer of blocks."""
    weights = linear("q", d_model, spec.num_heads * spec.head_dim)
    weights += linear("k", d_model, spec.head_dim)
    weights += norm_weights("q_norm", spec.head_dim, norm) + norm_weights("k_norm", spec.head_dim, norm)
    return [weight.under("indexer", PART) for weight in weights]


def block_indexer_mixing(spec: BlockIndexerSpec, num_keys: float) -> float:
    """Forward FLOPs of one query in its scores with `num_keys` keys."""
    return 2 * spec.num_heads * spec.head_dim * num_keys
