"""The cost of Mamba-2."""

from __future__ import annotations

from zoo.plan.base import Cost, Weight, linear
from zoo.plan.operations import convolved, keeping_input, norm, projected, times
from zoo.plan.tape import COMPILED, Tape, Value
from zoo.spec.mamba2 import Mamba2Spec
from zoo.spec.norm import NormSpec

CACHED_ELEMENTS = 2**18
"""Up to this size of their matrices of decays, chunks are taken together: `zoo.blocks.ssd.CACHED_ELEMENTS`."""


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

    def forward(self, tape: Tape, x: Value) -> Value:
        spec, d_model = self.spec, self.d_model
        shared_width = spec.num_groups * spec.d_state
        z = projected(tape, x, d_model, spec.d_inner, spec.bias)
        dt = projected(tape, x, d_model, spec.num_heads, spec.bias)
        parts = [projected(tape, x, d_model, width, spec.bias) for width in (spec.d_inner, shared_width, shared_width)]
        xbc = tape.join(parts)
        del parts
        xbc = convolved(tape, xbc, spec.d_conv, spec.conv_width, spec.conv_bias, activated=True)
        dt = tape.apply([dt], dt.numel, trains=spec.num_heads)
        y = self._scan(tape, xbc, keeping_input(tape, dt))
        return projected(tape, self._gated_norm(tape, y, z), spec.d_inner, d_model, spec.bias)

    def _scan(self, tape: Tape, xbc: Value, dt: Value) -> Value:
        """The recurrence: the compiled kernel keeps its arguments alone."""
        spec, tokens = self.spec, tape.num_tokens
        shared_width = spec.num_groups * spec.d_state
        x, b, c = tape.split(xbc, [tokens * width for width in (spec.d_inner, shared_width, shared_width)])
        state = tape.batch_size * spec.d_inner * spec.d_state
        inputs, size = [x, dt, b, c], tokens * spec.d_inner
        if xbc.itemsize != COMPILED:
            y = self._scan_by_torch(tape, inputs, xbc, state)
        else:
            grad_work = 2 * state + 2 * tokens * shared_width
            y = tape.apply(
                inputs, size, saves=[xbc, dt], keeps=state, work=state, grad_work=grad_work, trains=spec.num_heads
            )
        skipped = tape.apply([x], tokens * spec.d_inner, saves=[xbc], grad_work=x.numel, trains=spec.num_heads)
        return tape.add(y, skipped)

    def _scan_by_torch(self, tape: Tape, inputs: list[Value], xbc: Value, state: int) -> Value:
        """In steps of some chunks: kept are the arguments and a state for each step; the rest is made again."""
        spec, tokens = self.spec, tape.num_tokens
        length = min(spec.chunk_size, tape.seq_len)
        square = tape.batch_size * spec.num_heads * spec.chunk_size**2
        whole, rest = divmod(tape.seq_len, spec.chunk_size)
        together = min(max(1, CACHED_ELEMENTS // square), max(whole, 1))
        steps = -(-whole // together) + (rest > 0)
        decays = tape.batch_size * together * spec.num_heads * length**2
        some = tape.batch_size * together * length * spec.d_inner
        states = (together + 1) * state
        return tape.apply(
            inputs,
            tokens * spec.d_inner,
            saves=[xbc, inputs[1]],
            keeps=steps * state,
            work=max(3 * decays, decays + 2 * some + states),
            grad_work=max(4 * decays + 5 * some, 2 * decays + 7 * some) + 2 * states,
            trains=spec.num_heads,
        )

    def _gated_norm(self, tape: Tape, y: Value, z: Value) -> Value:
        spec = self.spec
        if y.itemsize == COMPILED:
            return tape.apply([y, z], y.numel, saves=[y, z], trains=spec.d_inner)
        opening = keeping_input(tape, z)
        if spec.norm_before_gate:
            return times(tape, norm(tape, y, spec.d_inner, NormSpec()), opening)
        return norm(tape, times(tape, y, opening), spec.d_inner, NormSpec())

    def cache(self, num_tokens: int) -> dict[str, float]:
        spec = self.spec
        return {"state": float(spec.d_inner * spec.d_state), "convolution": float(spec.d_conv * (spec.conv_width - 1))}
