"""What routed experts do with memory: `zoo.blocks.experts` in plain torch, as `auto` chooses on a CPU."""

from __future__ import annotations

from zoo.plan.operations import activated
from zoo.plan.tape import Tape, Value
from zoo.spec.moe import MoESpec

CROWDED = 1.5
"""Rows of the expert that has the most, over the mean of all: what random weights give a few hundred tokens."""
FEW_ROWS = 32
"""Rows an expert below which `auto` takes torch's grouped product, if rows are whole multiples of 16 bytes."""
INDEX = 8
"""Bytes of an index."""


def experts_forward(tape: Tape, spec: MoESpec, x: Value, scale: Value | None, d_in: int) -> Value:
    """The weighted sum of the chosen experts' outputs: x [t, d_in] in, the same out.

    Args:
        scale: the factor on each output; None: 1, and each row of x has one expert.
    """
    rows = tape.num_tokens * spec.top_k
    aligned = d_in * tape.itemsize % 16 == 0 and spec.d_expert * tape.itemsize % 16 == 0
    if aligned and rows < FEW_ROWS * spec.num_experts:
        return _by_kernel(tape, spec, x, scale, d_in)
    return _by_expert(tape, spec, x, scale, d_in)


def _num_weights(spec: MoESpec, d_in: int) -> tuple[int, int]:
    """Of the first products and of the last, biases included."""
    width = (1 + spec.gated) * spec.d_expert
    bias = spec.num_experts if spec.bias else 0
    return (spec.num_experts * d_in + bias) * width, (spec.num_experts * spec.d_expert + bias) * d_in


def _by_expert(tape: Tape, spec: MoESpec, x: Value, scale: Value | None, d_in: int) -> Value:
    """`zoo.blocks.grouped`: kept are x, the first product of every row and the order of the rows."""
    rows = tape.num_tokens * spec.top_k
    longest = min(rows, int(rows / spec.num_experts * CROWDED) + 1)
    order = [tape.new(rows, INDEX) for _ in range(3)]
    inputs = [x] if scale is None else [x, scale]
    hidden, outputs = tape.new(rows * (1 + spec.gated) * spec.d_expert), tape.new(rows * d_in)
    buffer = tape.new(longest * d_in)
    tape.new(2 * longest * spec.d_expert)
    result = tape.new(x.numel)
    del buffer, outputs
    sizes, again = [(value.numel, value.itemsize) for value in inputs], tape.again

    def pull(grads: list[Value | None]) -> list[Value | None]:
        row_grads, row_scales = tape.new(rows * d_in), tape.new(2 * rows)
        tape.train(sum(_num_weights(spec, d_in)), again)
        buffers = tape.new(2 * longest * d_in)
        tape.new(6 * longest * spec.d_expert)
        found: list[Value | None] = [tape.new(*size) for size in sizes]
        del row_grads, row_scales, buffers
        return found

    return tape.record(result, inputs, [*inputs, *order, hidden], pull, trains=True)


def _by_kernel(tape: Tape, spec: MoESpec, x: Value, scale: Value | None, d_in: int) -> Value:
    """torch's grouped product: kept are the gathered rows, both products and all of the activation between them."""
    rows = tape.num_tokens * spec.top_k
    first, last = _num_weights(spec, d_in)
    order = [tape.new(rows, INDEX) for _ in range(3)]
    gathered = tape.apply([x], rows * d_in, saves=order)
    hidden = tape.apply([gathered], rows * (1 + spec.gated) * spec.d_expert, saves=[gathered], trains=first)
    up, *gate = tape.split(hidden, [rows * spec.d_expert] * (1 + spec.gated))
    active = activated(tape, spec, up, gate[0] if gate else None)
    outputs = tape.apply([active], rows * d_in, saves=[active], trains=last)
    if scale is None:
        return tape.apply([outputs], x.numel, saves=order)
    return tape.apply([outputs, scale], x.numel, saves=[outputs, scale, *order], grad_work=rows * d_in)
