"""The cost of a dense and a routed channel mixer side by side."""

from __future__ import annotations

from zoo.plan.base import Cost, Weight
from zoo.plan.mlp import MLPCost
from zoo.plan.moe import MoECost
from zoo.plan.norm import norm_weights
from zoo.plan.operations import norm
from zoo.plan.tape import Tape, Value
from zoo.spec.parallel import ParallelSpec


class ParallelCost(Cost):
    """Both mixers (`dense`, and the parts of a mixture of experts) and the norms around each (`norms`)."""

    prices = ParallelSpec
    spec: ParallelSpec

    def weights(self) -> list[Weight]:
        dense = MLPCost(self.spec.dense, self.d_model, self.norm).weights()
        moe = MoECost(self.spec.moe, self.d_model, self.norm).weights()
        names = ("dense_norm", "dense_post_norm", "moe_norm", "moe_post_norm")
        norms = [weight for name in names for weight in norm_weights(name, self.d_model, self.norm, "norms")]
        return [weight.under("dense", "dense") for weight in dense] + [weight.under("moe") for weight in moe] + norms

    def forward(self, tape: Tape, x: Value) -> Value:
        def normed(value: Value) -> Value:
            return norm(tape, value, self.d_model, self.norm)

        dense = normed(MLPCost(self.spec.dense, self.d_model, self.norm).forward(tape, normed(x)))
        routed = MoECost(self.spec.moe, self.d_model, self.norm).forward(tape, normed(x), router_input=x)
        return tape.add(dense, normed(routed))
