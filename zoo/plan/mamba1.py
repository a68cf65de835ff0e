"""The cost of Mamba-1."""

from __future__ import annotations

from zoo.plan.base import Cost, Weight, linear
from zoo.plan.norm import norm_weights
from zoo.plan.operations import convolved, keeping_input, norm, projected, times
from zoo.plan.tape import Tape, Value
from zoo.spec.mamba1 import Mamba1Spec

MOST_STATES = 2**21
"""Entries of states that are held at a time: `zoo.blocks.selective_scan.MOST_STATES` of a CPU."""


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

    def forward(self, tape: Tape, x: Value) -> Value:
        spec, d_model, d_inner = self.spec, self.d_model, self.spec.d_inner or 0
        rank = spec.dt_rank or 0
        z = projected(tape, x, d_model, d_inner, spec.bias)
        x = convolved(
            tape,
            projected(tape, x, d_model, d_inner, spec.bias),
            d_inner,
            spec.conv_width,
            spec.conv_bias,
            activated=True,
        )
        widths = (spec.d_state, spec.d_state, rank)
        b, c, dt = (projected(tape, x, d_inner, width) for width in widths)
        if spec.inner_norms:
            inner = self.norm.replace(type="rms", bias=False)
            b, c, dt = (norm(tape, part, width, inner) for part, width in zip((b, c, dt), widths, strict=True))
        dt = projected(tape, dt, rank, d_inner)
        y = times(tape, self._scan(tape, x, dt, b, c), keeping_input(tape, z))
        return projected(tape, y, d_inner, d_model, spec.bias)

    def _scan(self, tape: Tape, x: Value, dt: Value, b: Value, c: Value) -> Value:
        """The recurrence, stretch by stretch: kept are its arguments and a state for each; the rest is made again."""
        spec, d_inner = self.spec, self.spec.d_inner or 0
        dt = keeping_input(tape, tape.apply([dt], dt.numel, trains=d_inner))
        state = tape.batch_size * d_inner * spec.d_state
        length = min(tape.seq_len, max(1, MOST_STATES // state))
        stretches = -(-tape.seq_len // length)
        y = tape.apply(
            [x, dt, b, c],
            x.numel,
            saves=[x, dt, b, c],
            keeps=stretches * state,
            work=4 * length * state + x.numel,
            grad_work=8 * length * state,
            trains=d_inner * spec.d_state,
        )
        return tape.add(y, tape.apply([x], x.numel, saves=[x], grad_work=x.numel, trains=d_inner))

    def cache(self, num_tokens: int) -> dict[str, float]:
        spec, d_inner = self.spec, self.spec.d_inner or 0
        return {"state": float(d_inner * spec.d_state), "convolution": float(d_inner * (spec.conv_width - 1))}
