"""The cost of a mixture of experts: of the experts, a token pays for those that it is sent to."""

from __future__ import annotations

from fractions import Fraction

from zoo.plan.base import Cost, Weight, linear
from zoo.plan.experts import experts_forward
from zoo.plan.mlp import MLPCost, mlp_weights
from zoo.plan.norm import norm_weights
from zoo.plan.operations import gated, keeping_result, norm, projected
from zoo.plan.router import Routed, router_cost
from zoo.plan.tape import Tape, Value
from zoo.spec.mlp import ActivationSpec, MLPSpec
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

    def forward(self, tape: Tape, x: Value, router_input: Value | None = None) -> Value:
        spec = self.spec
        router = router_cost(spec.router, self.d_model, spec.num_experts)
        routed = router.forward(tape, router_input or x, spec.top_k)
        losses = self._watched(tape, routed)
        y = self._routed(tape, x, routed)
        if spec.num_shared_experts:
            y = tape.add(y, self._shared(tape, x))
        return tape.adjoin(y, losses)

    def _watched(self, tape: Tape, routed: Routed) -> list[Value]:
        """The losses of balancing."""
        balance, found = self.spec.balance, []
        if balance.aux_loss:
            found.append(
                tape.apply([routed.scores], 1, saves=[routed.scores], keeps=tape.num_tokens, work=routed.scores.numel)
            )
        if balance.z_loss:
            found.append(tape.apply([routed.logits], 1, saves=[routed.logits], keeps=2 * tape.num_tokens))
        return found

    def _routed(self, tape: Tape, x: Value, routed: Routed) -> Value:
        spec, d_in = self.spec, self.spec.d_latent or self.d_model
        if spec.d_latent:
            x = projected(tape, x, self.d_model, d_in)
        inner = self.norm.replace(type="rms", bias=False)
        if getattr(spec.router, "weigh", "output") == "input":
            num_choices = tape.num_tokens * spec.top_k
            weighed = tape.apply(
                [x, routed.weights], num_choices * d_in, saves=[x, routed.weights], grad_work=num_choices * d_in
            )
            y = experts_forward(tape, spec, weighed, None, d_in)
            y = tape.apply([y], tape.num_tokens * d_in)
        else:
            y = experts_forward(tape, spec, x, routed.weights, d_in)
        if spec.latent_norm:
            y = norm(tape, y, d_in, inner)
        return projected(tape, y, d_in, self.d_model) if spec.d_latent else y

    def _shared(self, tape: Tape, x: Value) -> Value:
        spec = self.spec
        activation = {name: getattr(spec, name) for name in ActivationSpec.model_fields}
        y = MLPCost(MLPSpec(d_ffn=spec.d_shared, **activation), self.d_model, self.norm).forward(tape, x)
        if not spec.shared_gate:
            return y
        return gated(tape, y, keeping_result(tape, projected(tape, x, self.d_model, 1)))
