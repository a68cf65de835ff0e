"""The cost of the gated short convolution."""

from __future__ import annotations

from zoo.plan.base import Cost, Weight, linear
from zoo.spec.short_conv import ShortConvSpec


class ShortConvCost(Cost):
    """Four square matrices. The convolution is no matrix product."""

    prices = ShortConvSpec
    spec: ShortConvSpec

    def weights(self) -> list[Weight]:
        d_model, bias = self.d_model, self.spec.bias
        weights = [weight for name in "bcv" for weight in linear(name, d_model, d_model, bias)]
        weights.append(Weight("conv.weight", (d_model, 1, self.spec.width)))
        weights += [Weight("conv.bias", (d_model,))] if bias else []
        return weights + linear("out", d_model, d_model, bias)

    def cache(self, num_tokens: int) -> dict[str, float]:
        return {"convolution": float(self.d_model * (self.spec.width - 1))}
