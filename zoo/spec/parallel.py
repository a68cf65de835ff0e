"""A dense and a routed channel mixer side by side in one branch."""

from __future__ import annotations

from typing import Literal, Self

from zoo.spec.base import register_spec
from zoo.spec.block import FFNSpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.moe import MoESpec


@register_spec
class ParallelSpec(FFNSpec):
    """norm(dense(norm(x))) + norm(moe(norm(x))), four norms. The router reads x itself, the experts its norm.

    The branch around it is placed `post`: what is outside of the norms here is the residual stream.
    """

    type: Literal["parallel"] = "parallel"
    dense: MLPSpec
    moe: MoESpec

    def resolved(self, d_model: int) -> Self:
        return self.replace(dense=self.dense.resolved(d_model), moe=self.moe.resolved(d_model))

    def shrunk(self, d_model: int) -> Self:
        return self.replace(dense=self.dense.shrunk(d_model), moe=self.moe.shrunk(d_model))
