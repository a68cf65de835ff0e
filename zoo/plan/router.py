"""The cost of routers."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from zoo.plan.base import Weight
from zoo.plan.operations import keeping_result, norm, projected, scaled
from zoo.plan.tape import Tape, Value
from zoo.spec.base import mirrored
from zoo.spec.norm import NormSpec
from zoo.spec.router import RouterSpec, SparseMixerRouterSpec, TopKRouterSpec


class Routed(NamedTuple):
    """What the module's `Routing` holds."""

    weights: Value
    indices: Value
    scores: Value
    logits: Value


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

    def forward(self, tape: Tape, x: Value, top_k: int) -> Routed:
        """Tell `tape` what the module's forward pass does with memory: x [t, d_model] in. Arithmetic is fp32."""
        logits = projected(tape, x, self.d_model, self.num_experts)
        return self.route(tape, logits, top_k)

    def route(self, tape: Tape, logits: Value, top_k: int) -> Routed:
        """The choice by logits [t, e]."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its choice keeps")


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

    def forward(self, tape: Tape, x: Value, top_k: int) -> Routed:
        if self.spec.input_norm:
            x = norm(tape, x, self.d_model, NormSpec())
        return super().forward(tape, x, top_k)

    def route(self, tape: Tape, logits: Value, top_k: int) -> Routed:
        spec, num_choices = self.spec, tape.num_tokens * top_k
        scores = keeping_result(tape, logits)
        indices = tape.new(num_choices, 8)
        chosen = logits if spec.score_chosen else scores
        weights = tape.apply([chosen], num_choices, saves=[indices])
        if spec.score_chosen:
            weights = keeping_result(tape, weights)
        if spec.normalize:
            weights = tape.apply([weights], num_choices, saves=[weights], keeps=tape.num_tokens)
        if spec.expert_scale:
            weights = tape.apply([weights], num_choices, saves=[weights], keeps=num_choices, trains=self.num_experts)
        if spec.route_scale != 1:
            weights = scaled(tape, weights)
        return Routed(weights, indices, scores, logits)


class SparseMixerRouterCost(RouterCost):
    """The matrix alone."""

    prices = SparseMixerRouterSpec

    def route(self, tape: Tape, logits: Value, top_k: int) -> Routed:
        scores = keeping_result(tape, logits)
        indices = tape.new(tape.num_tokens * top_k, 8)
        # Each choice has a softmax and a mask of its own.
        weights = tape.apply(
            [logits], tape.num_tokens * top_k, saves=[indices], keeps=1.25 * top_k * logits.numel, work=3 * logits.numel
        )
        return Routed(weights, indices, scores, logits)


def router_cost(spec: RouterSpec, d_model: int, num_experts: int) -> RouterCost:
    """The cost of a described router."""
    cost: type[RouterCost] = mirrored(type(spec), "plan", RouterCost, lambda found: getattr(found, "prices", None))
    return cost(spec, d_model, num_experts)
