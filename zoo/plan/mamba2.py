"""The cost of Mamba-2."""

from __future__ import annotations

from zoo.plan.base import Cost, Weight, linear
from zoo.spec.mamba2 import Mamba2Spec


class Mamba2Cost(Cost):
    """Projections, and the products inside chunks and with the state (`scan`). The convolution is no matrix product."""

    prices = Mamba2Spec
    spec: Mamba2Spec

    def weights(self) -> list[Weight]:
        spec, heads = self.spec, (self.spec.num_heads,)
        shared_width = spec.num_groups * spec.d_state
        widths = {"z": spec.d_inner, "x": spec.d_inner, "b": shared_width, "c": shared_width, "dt": spec.num_heads}
        weights = [weight for name, width in widths.items() for weight in linear(name, self.d_model, width, spec.bias)]
        weights.append(Weight("conv.weight", (spec.d_conv, 1, spec.conv_width)))
        if spec.conv_bias:
            weights.append(Weight("conv.bias", (spec.d_conv,)))
        weights += [Weight("a_log", heads), Weight("dt_bias", heads), Weight("skip", heads)]
        return [*weights, Weight("norm.weight", (spec.d_inner,)), *linear("out", spec.d_inner, self.d_model, spec.bias)]

    def mixing(self, seq_len: int, skip_masked: bool) -> dict[str, float]:
        """The chunked form: c with b, their scores with x, and what a chunk writes to its state and reads from it."""
        spec = self.spec
        whole, rest = divmod(seq_len, spec.chunk_size)
        lengths = [spec.chunk_size] * whole + [rest]
        pairs = sum(length * (length + 1) / 2 if skip_masked else length**2 for length in lengths)
        inside = pairs * (spec.num_groups * spec.d_state + spec.d_inner)
        with_state = 2 * seq_len * spec.d_inner * spec.d_state
        return {"scan": 2 * (inside + with_state) / seq_len}

    def cache(self, num_tokens: int) -> dict[str, float]:
        spec = self.spec
        return {"state": float(spec.d_inner * spec.d_state), "convolution": float(spec.d_conv * (spec.conv_width - 1))}
