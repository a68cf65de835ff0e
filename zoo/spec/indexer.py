"""Indexers: small side branches that choose which earlier keys a query attends to."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from zoo.spec.base import Spec, problem


class IndexerSpec(Spec):
    """Chooses single keys (arXiv:2512.02556, section 2.1).

    No gradient passes through a choice, so training a model leaves the weights of its indexers as they are.
    """

    num_heads: PositiveInt
    head_dim: PositiveInt
    top_k: PositiveInt
    """Earlier keys that a query attends to, itself included."""
    rope_layout: Literal["half", "interleaved"] = "half"
    """Which of the leading channels turn together; theta and scaling are those of the attention."""
    norm_eps: PositiveFloat = 1e-6
    """Of the layer norm of the keys."""
    reuse: bool = False
    """Take over the choice of the nearest layer before that makes one, instead of making one (arXiv:2603.12201)."""

    def shrunk(self, rope_head_dim: int) -> IndexerSpec:
        """Few channels but many heads: scores are equal, and a choice arbitrary, where no head responds to keys."""
        return self.replace(num_heads=16, head_dim=rope_head_dim + 8, top_k=min(self.top_k, 16))


class BlockIndexerSpec(Spec):
    """Chooses blocks of keys: each index head for its own group of attention heads."""

    num_heads: PositiveInt
    head_dim: PositiveInt
    block_size: PositiveInt
    """Keys of a block; a block scores as its best key."""
    top_k: PositiveInt
    """Blocks that a query attends to."""
    num_local: NonNegativeInt = 1
    """How many of them are fixed: the block of the query itself and those just before it."""

    @model_validator(mode="after")
    def _check(self) -> BlockIndexerSpec:
        if self.num_local > self.top_k:
            raise problem("num_local", self.num_local, f"must be at most top_k ({self.top_k})")
        return self

    def shrunk(self, head_dim: int) -> BlockIndexerSpec:
        """One or two index heads as wide as the attention's, two blocks of eight keys."""
        changes = {"num_heads": min(self.num_heads, 2), "head_dim": head_dim, "num_local": min(self.num_local, 1)}
        return self.replace(block_size=8, top_k=2, **changes)
