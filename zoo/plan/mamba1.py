"""The cost of Mamba-1."""

from __future__ import annotations

from zoo.plan.base import Cost, Weight, linear
from zoo.plan.norm import norm_weights
from zoo.spec.mamba1 import Mamba1Spec


class Mamba1Cost(Cost):
    """Projections, and the product of states with what reads from them (`scan`); the rest is no matrix product."""

    prices = Mamba1Spec
    spec: Mamba1Spec

    def weights(self) -> list[Weight]:
        spec, d_inner, rank = self.spec, self.spec.d_inner or 0, self.spec.dt_rank or 0
        weights = linear("z", self.d_model, d_inner, spec.bias) + linear("x", self.d_model, d_inner, spec.bias)
        weights.append(Weight("conv.weight", (d_inner, 1, spec.conv_width)))
        if spec.conv_bias:
            weights.append(Weight("conv.bias", (d_inner,)))
        norm = self.norm.replace(type="rms", bias=False)
        for name, width in {"b": spec.d_state, "c": spec.d_state, "dt_down": rank}.items():
            weights += linear(name, d_inner, width)
            if spec.inner_norms:
                weights += norm_weights(f"{name.removesuffix('_down')}_norm", width, norm)
        weights += linear("dt", rank, d_inner)
        weights += [Weight("dt_bias", (d_inner,)), Weight("a_log", (d_inner, spec.d_state)), Weight("skip", (d_inner,))]
        return weights + linear("out", d_inner, self.d_model, spec.bias)

    def mixing(self, seq_len: int, skip_masked: bool) -> dict[str, float]:
        return {"scan": 2 * (self.spec.d_inner or 0) * self.spec.d_state}

    def cache(self, num_tokens: int) -> dict[str, float]:
        spec, d_inner = self.spec, self.spec.d_inner or 0
        return {"state": float(d_inner * spec.d_state), "convolution": float(d_inner * (spec.conv_width - 1))}
