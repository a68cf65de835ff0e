"""What the operations that blocks share take, keep and free, as torch runs them on a CPU.

The counts were read from torch's own events of memory; `tests/plan/test_own_memory.py` holds them against it.
"""

from __future__ import annotations

from zoo.plan.tape import COMPILED, Tape, Value
from zoo.spec.mlp import ActivationSpec
from zoo.spec.norm import NormSpec
from zoo.spec.rope import RopeSpec


def projected(tape: Tape, x: Value, d_in: int, d_out: int, bias: bool = False) -> Value:
    """x [..., d_in] times a matrix [d_out, d_in]."""
    numel = x.numel // d_in * d_out
    return tape.apply([x], numel, saves=[x], trains=d_in * d_out + (d_out if bias else 0))


def norm(tape: Tape, x: Value, width: int, spec: NormSpec) -> Value:
    """A norm over `width` channels.

    torch's layer norm is one operation, and so is the compiled RMS norm in fp32, which keeps x and a number a row;
    torch's is a chain.
    """
    rows, weighed = x.numel // width, spec.weight != "none"
    weights = width * (weighed + spec.bias)
    if spec.type == "layer":
        return tape.apply([x], x.numel, saves=[x], keeps=2 * rows, trains=weights)
    if x.itemsize < 4:  # x is widened to fp32 and back; kept are the wide one and the result before its weight
        keeps = (4 / x.itemsize + weighed) * x.numel
        return tape.apply([x], x.numel, keeps=keeps, work=2 * x.numel, grad_work=4 * x.numel, trains=weights)
    return tape.apply([x], x.numel, saves=[x], keeps=rows, trains=weights)


def scaled(tape: Tape, x: Value) -> Value:
    """x times a constant."""
    return tape.apply([x], x.numel)


def times(tape: Tape, left: Value, right: Value) -> Value:
    """The product of values of one size, entry by entry."""
    return tape.apply([left, right], left.numel, saves=[left, right])


def gated(tape: Tape, y: Value, opening: Value) -> Value:
    """y times what a gate lets through, which has as many entries as y, or one for several."""
    return tape.apply([y, opening], y.numel, saves=[y, opening], grad_work=y.numel if opening.numel < y.numel else 0)


def keeping_input(tape: Tape, x: Value) -> Value:
    """A function of each entry whose gradient needs the entry: silu, gelu, softplus, clamp."""
    return tape.apply([x], x.numel, saves=[x])


def squared(tape: Tape, x: Value) -> Value:
    """The square of each entry: torch's power, whose gradient goes through two further tensors."""
    return tape.apply([x], x.numel, saves=[x], grad_work=2 * x.numel)


def keeping_result(tape: Tape, x: Value) -> Value:
    """A function of each entry whose gradient needs the result: sigmoid, tanh, exp, relu."""
    return tape.apply([x], x.numel, saves_result=True)


def turned(tape: Tape, x: Value, head_dim: int, rotary_dim: int, rope: RopeSpec) -> Value:
    """Rotary positions on the leading `rotary_dim` channels of heads of `head_dim`."""
    tables = tape.once(("rope", rope.theta, rope.scaling, rotary_dim), lambda: tape.new(tape.seq_len * rotary_dim))
    if x.itemsize == COMPILED:
        return tape.apply([x], x.numel, saves=[tables])
    turning = x.numel * rotary_dim // head_dim
    partly = turning < x.numel
    # Half of the channels times cos and sin, and their sum, at a time; back, each half is spread to its whole width.
    return tape.apply(
        [x],
        x.numel,
        saves=[tables],
        work=turning if not partly else 1.5 * turning,
        grad_work=turning + (x.numel if partly else 0),
    )


def activated(tape: Tape, spec: ActivationSpec, up: Value, gate: Value | None) -> Value:
    """`zoo.blocks.activation.activate`."""
    if gate is None:
        return _plain(tape, spec.activation, up)
    match spec.activation:
        case "clamped_swish":
            gate, up = keeping_input(tape, gate), keeping_input(tape, up)
            opening = keeping_result(tape, scaled(tape, gate))
            return times(tape, scaled(tape, up), times(tape, gate, opening))
        case "clamped_silu":
            gate = keeping_input(tape, gate)
            return times(tape, keeping_input(tape, gate), keeping_input(tape, up))
        case "silu_clamped":
            return times(tape, keeping_input(tape, keeping_input(tape, gate)), keeping_input(tape, up))
        case "situ":
            wide = scaled(tape, keeping_result(tape, scaled(tape, gate)))
            opened_gate = times(tape, wide, keeping_result(tape, gate))
            return times(tape, opened_gate, scaled(tape, keeping_result(tape, scaled(tape, up))))
        case "silu" if up.itemsize == COMPILED:
            return tape.apply([gate, up], up.numel, saves=[gate, up])
        case _:
            return times(tape, _plain(tape, spec.activation, gate), up)


def _plain(tape: Tape, activation: str, x: Value) -> Value:
    if activation == "relu":
        return keeping_result(tape, x)
    if activation == "relu2":
        return squared(tape, keeping_result(tape, x))
    return keeping_input(tape, x)


def attended(tape: Tape, q: Value, k: Value, v: Value, *, num_heads: int, widths: tuple[int, int], mask: int) -> Value:
    """Queries [b, h, s, k] attend to keys [b, g, s, k] and values [b, g, s, v].

    In fp32 a compiled kernel takes the plain causal rule. Else torch has a fused form of it on a CPU for heads of one
    width; others have the whole matrix of scores in memory.

    Args:
        widths: k and v.
        mask: entries of a mask beside the causal rule, of which every layer makes numbers; 0: none.
    """
    masks = [tape.new(mask)] if mask else []
    rows = tape.num_tokens * num_heads
    if not mask and q.itemsize == COMPILED:
        return tape.apply([q, k, v], rows * widths[1], saves=[q, k, v], keeps=rows)
    if widths[0] == widths[1]:
        return tape.apply([q, k, v], rows * widths[1], saves=[q, k, v, *masks], saves_result=True, keeps=rows)
    return attended_in_full(tape, q, k, v, num_heads=num_heads, widths=widths)


def attended_in_full(tape: Tape, q: Value, k: Value, v: Value, *, num_heads: int, widths: tuple[int, int]) -> Value:
    """Attention with the whole matrix of scores."""
    rows = tape.num_tokens * num_heads
    scores = rows * tape.seq_len
    return tape.apply(
        [q, k, v],
        rows * widths[1],
        keeps=scores + 2 * q.numel + v.numel,
        work=2.25 * scores + 3 * q.numel,
        grad_work=max(2 * scores - 2 * q.numel, 0),  # gone before the gradients of queries and keys are there
    )


def attended_eagerly(
    tape: Tape, q: Value, k: Value, v: Value, num_heads: int, widths: tuple[int, int], softcap: bool
) -> Value:
    """`zoo.blocks.attention.Attention._attend_eagerly`."""
    rows = tape.num_tokens * num_heads
    scores = rows * tape.seq_len
    return tape.apply(
        [q, k, v],
        rows * widths[1],
        saves=[q],
        keeps=scores * (1 + softcap) + rows * sum(widths),
        work=3 * scores + rows * sum(widths),
        grad_work=2 * scores,
    )


def convolved(tape: Tape, x: Value, channels: int, width: int, bias: bool, activated: bool) -> Value:
    """`zoo.blocks.conv.CausalConv`; the compiled kernel makes again what comes before the activation."""
    weights = channels * width + (channels if bias else 0)
    if x.itemsize == COMPILED:
        return tape.apply([x], x.numel, saves=[x], grad_work=tape.batch_size * weights, trains=weights)
    return tape.apply(
        [x],
        x.numel,
        saves=[x],
        keeps=x.numel if activated else 0,
        grad_work=2 * x.numel if activated else x.numel,
        trains=weights,
    )
