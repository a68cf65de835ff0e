"""The cost of a mixture of experts: of the experts, a token pays for those that it is sent to."""

from __future__ import annotations

from fractions import Fraction

from zoo.plan.base import Cost, Weight, linear
from zoo.plan.mlp import mlp_weights
from zoo.plan.norm import norm_weights
from zoo.plan.router import router_cost
from zoo.spec.moe import MoESpec


class MoECost(Cost):
    """Router, routed experts with the projections around them, shared experts."""

    prices = MoESpec
    spec: MoESpec

    def weights(self) -> list[Weight]:
        spec = self.spec
        router = router_cost(spec.router, self.d_model, spec.num_experts)
        weights = [weight.under("router", "router") for weight in router.weights()]
        return weights + self._latent_weights() + self._expert_weights() + self._shared_weights()

    def _latent_weights(self) -> list[Weight]:
        spec = self.spec
        if not spec.d_latent:
            return []
        inner = self.norm.replace(type="rms", bias=False)
        norm = norm_weights("latent_norm", spec.d_latent, inner, "latent") if spec.latent_norm else []
        down = linear("latent_down", self.d_model, spec.d_latent, part="latent")
        return [*down, *norm, *linear("latent_up", spec.d_latent, self.d_model, part="latent")]

    def _expert_weights(self) -> list[Weight]:
        spec, d_in = self.spec, self.spec.d_latent or self.d_model
        experts, share = spec.num_experts, Fraction(spec.top_k, spec.num_experts)
        first, rows = ("gate_up", 2 * spec.d_expert) if spec.gated else ("up", spec.d_expert)
        shapes = {first: (experts, rows, d_in), "down": (experts, d_in, spec.d_expert)}
        weights = [Weight(f"experts.{name}", shape, True, share, "experts") for name, shape in shapes.items()]
        if spec.bias:
            biases = {f"experts.{name}_bias": shape[:2] for name, shape in shapes.items()}
            weights += [Weight(name, shape, False, share, "experts") for name, shape in biases.items()]
        return weights

    def _shared_weights(self) -> list[Weight]:
        spec = self.spec
        if not spec.num_shared_experts:
            return []
        shared = mlp_weights(self.d_model, spec.d_shared, spec.gated, spec.bias)
        gate = linear("shared_gate", self.d_model, 1, part="shared") if spec.shared_gate else []
        return [weight.under("shared", "shared") for weight in shared] + gate
