"""The cost of the gated short convolution."""

from __future__ import annotations

from zoo.plan.base import Cost, Weight, linear
from zoo.plan.operations import convolved, projected, times
from zoo.plan.tape import Tape, Value
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

    def forward(self, tape: Tape, x: Value) -> Value:
        d_model, bias = self.d_model, self.spec.bias

        def square(value: Value) -> Value:
            return projected(tape, value, d_model, d_model, bias)

        mixed = convolved(tape, times(tape, square(x), square(x)), d_model, self.spec.width, bias, activated=False)
        return square(times(tape, square(x), mixed))

    def cache(self, num_tokens: int) -> dict[str, float]:
        return {"convolution": float(self.d_model * (self.spec.width - 1))}
