"""The time of a step of zoo's own training on the machine at hand: what it does, operation by operation, at what the
machine was measured to take for each kind of operation.

`zoo.train.trace` says what a model does, `zoo.hardware` what the machine takes; here is the arithmetic between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from zoo.plan.layout import Array

IN_TRAINING = 1.12
"""Everything in a step over the same measured alone: caches hold what other operations left there. One over the median
ratio of predicted to measured steps of the ten models named in benchmarks/local_time.py, none of which it reports."""


class Op(NamedTuple):
    """A kind of eager operation, and how much there is of it.

    `view`: none. `product`, `grouped`: stack, m, n, k. `attend`, `attend_back`: sequences * heads, queries, keys,
    width, 1 if causal. `stream`: bytes. `fresh`: bytes that the system hands out. All others: elements.
    """

    kind: str
    size: tuple[int, ...] = ()


Ops = Mapping[Op, int]
"""How often each is done."""


@dataclass(frozen=True)
class StepOps:
    """What training does."""

    passes: Ops
    """Forward and backward of one micro-batch."""
    layers_again: Ops
    """Those of the forward pass that recomputing layers repeats."""
    update: Ops
    """Of the optimizer, beside its fused part."""
    fused_elements: int
    """Parameters that the fused AdamW updates."""
    fused_tensors: int
    elements: int
    """All trained parameters."""
    tensors: int


@dataclass(frozen=True)
class Rates:
    """What a machine takes, measured. Seconds; sizes as `Op` has them."""

    op_s: float
    """For an eager operation beside its arithmetic: Python, dispatch, autograd."""
    plain_op_s: float = 0.0
    """The same without autograd."""
    curves: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    """By kind: size and seconds beside those of an operation on next to nothing, rising."""
    products: Sequence[Sequence[float]] = ()
    """Stack, m, n, k, seconds."""
    attention: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    """`causal`, `masked`, and these with `_back`: queries, width, seconds for a pair of a query and a key, masked or
    not, and a channel."""
    fresh_byte_s: float = 0.0
    """For a byte of memory that the system hands out."""
    adamw: Sequence[float] = (0.0, 0.0, 0.0)
    """For an element, for a tensor, and for a call."""
    clip: Sequence[float] = (0.0, 0.0, 0.0)
    """The same for the norm of all gradients and their scaling."""

    @cached_property
    def product_fit(self) -> dict[bool, Array]:
        """Seconds per FLOP of a plain and of a stacked product as a + b/m + c/n + d/k."""
        table = np.array(self.products, dtype=np.float64)
        stacked = table[:, 0] > 1
        return {alike: _inverse_fit(table[stacked == alike]) for alike in (False, True)}

    @cached_property
    def attention_fit(self) -> dict[str, Array]:
        """Seconds per pair and channel as a + b/queries + c/width."""
        return {
            name: _relative_fit(np.array(rows)[:, :2], np.array(rows)[:, 2]) for name, rows in self.attention.items()
        }

    def seconds(self, op: Op) -> float:
        """Of one operation, beside `op_s`."""
        match op.kind:
            case "view":
                return 0.0
            case "fresh":
                return op.size[0] * self.fresh_byte_s
            case "product" | "grouped":
                stack, m, n, k = op.size
                # The products of a group are done one after the other, each by all threads.
                fit = self.product_fit[stack > 1 and op.kind == "product"]
                each = float(fit @ np.array([1, 1 / max(m, 1), 1 / max(n, 1), 1 / max(k, 1)]))
                return 2.0 * stack * m * n * k * each
            case "attend" | "attend_back":
                heads, queries, keys, width, causal = op.size
                name = ("causal" if causal else "masked") + ("_back" if op.kind == "attend_back" else "")
                each = float(self.attention_fit[name] @ np.array([1, 1 / queries, 1 / width]))
                return heads * queries * keys * width * each
        return self._on_curve(op.kind, float(op.size[0]))

    def _on_curve(self, kind: str, size: float) -> float:
        if size <= 0:
            return 0.0
        sizes, seconds = np.array(self.curves[kind]).T
        rate = np.exp(np.interp(math.log(size), np.log(sizes), np.log(seconds / sizes)))
        return float(rate * size)


def _inverse_fit(table: Array) -> Array:
    flops = 2.0 * np.prod(table[:, :4], axis=1)
    return _relative_fit(table[:, 1:4], table[:, 4] / flops)


def _relative_fit(sizes: Array, each: Array) -> Array:
    """The coefficients, none negative, of 1 and of the inverse sizes that come nearest to `each`, in proportion."""
    design = np.concatenate([np.ones((len(sizes), 1)), 1.0 / sizes], axis=1) / each[:, None]
    kept = np.ones(design.shape[1], dtype=bool)
    found = np.zeros(design.shape[1])
    while kept.any():
        found[:] = 0.0
        found[kept] = np.linalg.lstsq(design[:, kept], np.ones(len(each)), rcond=None)[0]
        if (found >= 0).all():
            break
        kept &= found > 0
    return found


def step_seconds(
    ops: StepOps, rates: Rates, micro_batches: int = 1, again: bool = False, products: float = 1.0
) -> dict[str, float]:
    """Seconds of a step by part.

    Args:
        micro_batches: gradients are accumulated over as many.
        again: layers are computed a second time in the backward pass.
        products: how many times as long matrix products take as in fp32, the optimizer's aside.
    """
    parts = {"products": 0.0, "attention": 0.0, "elementwise": 0.0, "host": 0.0}
    for some in (ops.passes, ops.layers_again) if again else (ops.passes,):
        for name, seconds in seconds_of(some, rates, rates.op_s).items():
            parts[name] += micro_batches * seconds
    parts["products"] *= products
    added = rates.seconds(Op("stream", (12 * ops.elements,))) + ops.tensors * rates.op_s
    parts["accumulate"] = (micro_batches - 1) * added
    update = sum(seconds_of(ops.update, rates, rates.plain_op_s).values())
    for (element, tensor, call), elements, tensors in (
        (rates.adamw, ops.fused_elements, ops.fused_tensors),
        (rates.clip, ops.elements, ops.tensors),
    ):
        update += element * elements + tensor * tensors + call
    parts["optimizer"] = update
    return {name: seconds * IN_TRAINING for name, seconds in parts.items()}


_PART = {"product": "products", "grouped": "products", "attend": "attention", "attend_back": "attention"}


def seconds_of(ops: Ops, rates: Rates, op_s: float) -> dict[str, float]:
    """Seconds of operations by part: `products`, `attention`, `elementwise`, and `host`, `op_s` for each of them."""
    parts = {"products": 0.0, "attention": 0.0, "elementwise": 0.0, "host": 0.0}
    for op, times in ops.items():
        parts[_PART.get(op.kind, "elementwise")] += times * rates.seconds(op)
        parts["host"] += times * op_s * (op.kind != "fresh")
    return parts
