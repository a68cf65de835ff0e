"""The cost of indexers."""

from __future__ import annotations

from zoo.plan.base import Weight, linear
from zoo.plan.norm import norm_weights
from zoo.plan.tape import Tape
from zoo.spec.indexer import BlockIndexerSpec, IndexerSpec
from zoo.spec.norm import NormSpec

PART = "indexer"
SCORES_AT_ONCE = 2**24
"""Most scores that a choice of keys has in memory at a time: `zoo.blocks.indexer.SCORES_AT_ONCE`."""


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


def choose_keys(tape: Tape, spec: IndexerSpec) -> None:
    """What a choice of keys holds while it is made: scores, and a copy of all keys for each query in the product."""
    pairs = tape.batch_size * tape.seq_len
    queries = min(tape.seq_len, max(1, SCORES_AT_ONCE // (pairs * spec.num_heads)))
    scores, keys = queries * pairs * spec.num_heads, queries * pairs * spec.head_dim
    tape.new(scores + max(keys, scores) + tape.num_tokens * spec.num_heads * spec.head_dim)
    tape.once("index", lambda: tape.new(tape.num_tokens * spec.top_k, 8))


def choose_blocks(tape: Tape, spec: BlockIndexerSpec) -> None:
    """What a choice of blocks of keys holds while it is made."""
    scores = tape.num_tokens * spec.num_heads * tape.seq_len
    tape.new(2 * scores)
