"""The cost of routers."""

from __future__ import annotations

from typing import Any, ClassVar

from zoo.plan.base import Weight
from zoo.spec.base import mirrored
from zoo.spec.router import RouterSpec, SparseMixerRouterSpec, TopKRouterSpec


class RouterCost:
    """The cost of a router. Subclasses name the spec that they price and stand in the mirrored module of `zoo.plan`."""

    prices: ClassVar[type[RouterSpec]]

    def __init__(self, spec: Any, d_model: int, num_experts: int) -> None:
        self.spec = spec
        self.d_model = d_model
        self.num_experts = num_experts

    def weights(self) -> list[Weight]:
        """Every trained tensor, named below the router; the matrix of logits [num_experts, d_model] at least."""
        return [Weight("weight", (self.num_experts, self.d_model), product=True)]


class TopKRouterCost(RouterCost):
    """The matrix and, by option, vectors over experts or channels."""

    prices = TopKRouterSpec
    spec: TopKRouterSpec

    def weights(self) -> list[Weight]:
        spec, experts = self.spec, (self.num_experts,)
        vectors = {
            "bias": (spec.logit_bias, experts),
            "correction_bias": (spec.count_bias, experts),
            "expert_scale": (spec.expert_scale, experts),
            "input_scale": (spec.input_norm, (self.d_model,)),
        }
        return super().weights() + [Weight(name, shape) for name, (there, shape) in vectors.items() if there]


class SparseMixerRouterCost(RouterCost):
    """The matrix alone."""

    prices = SparseMixerRouterSpec


def router_cost(spec: RouterSpec, d_model: int, num_experts: int) -> RouterCost:
    """The cost of a described router."""
    cost: type[RouterCost] = mirrored(type(spec), "plan", RouterCost, lambda found: getattr(found, "prices", None))
    return cost(spec, d_model, num_experts)
