"""A dense and a routed channel mixer side by side in one branch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.blocks.base import Block, Context
from zoo.blocks.mlp import MLP
from zoo.blocks.moe import MoE
from zoo.blocks.norm import Norm
from zoo.spec.parallel import ParallelSpec


class Parallel(Block):
    """The sum of a dense and a routed branch, each between norms of its own."""

    describes = ParallelSpec
    spec: ParallelSpec

    def __init__(self, d_model: int, spec: ParallelSpec | None = None, **options: Any) -> None:
        super().__init__(d_model, spec, **options)
        self.dense_norm, self.dense_post_norm = (Norm(d_model, self.norm_spec) for _ in range(2))
        self.moe_norm, self.moe_post_norm = (Norm(d_model, self.norm_spec) for _ in range(2))
        self.dense = MLP(d_model, self.spec.dense, norm=self.norm_spec)
        self.moe = MoE(d_model, self.spec.moe, norm=self.norm_spec)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [b, s, d_model], the residual stream without a norm; the result has its shape."""
        dense = self.dense_post_norm(self.dense(self.dense_norm(x), context))
        routed = self.moe(self.moe_norm(x), context, router_input=x)
        return dense + self.moe_post_norm(routed)
