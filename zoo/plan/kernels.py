"""Seconds of kernels on one device, from shapes and the facts of a chip. Arrays in, arrays out; shapes broadcast.

The curves have few numbers and follow measured tables (throughput_notes.md, sections 3.1 to 3.3): a kernel takes its
arithmetic and its memory traffic together, as the hypotenuse of the two, and starts a few microseconds late.
"""

from __future__ import annotations

import numpy as np

from zoo.plan.layout import Array

START_S = 3.7e-6
"""From one kernel to the next without gaps: the measured time of very small products, on all chips."""
TILE_ROWS = 128.0
"""Rows of an expert are filled up to whole tiles; half a tile on average."""
BACKWARD_SCORES = 2.5 / 0.84
"""Attention backward over forward: five products to two, at 0.84 of the speed."""


def product_seconds(
    m: Array, n: Array, k: Array, stack: Array, flop_s: Array, byte_s: Array, width: Array | float = 2.0
) -> Array:
    """Seconds of [m, k] @ [k, n], or of `stack` such products whose rows sum to m; a stack of 0 is a plain product.

    Grouped products do one after the other what plain ones do at once: measured alone with few wide and many narrow
    experts, their time is the sum of arithmetic and traffic (benchmarks/fit_kernels.py).

    Args:
        flop_s: what large products reach.
        byte_s: what memory reaches.
        width: bytes of a factor; products are written in bf16.
    """
    grouped = stack > 0
    rows = m + np.where(grouped, stack * TILE_ROWS / 2, 0.0)
    arithmetic = 2 * rows * n * k / flop_s
    traffic = (m * (2 * n + width * k) + np.where(grouped, 0.4 * stack, 1.0) * width * n * k) / byte_s
    both = np.where(grouped, arithmetic + traffic, np.hypot(arithmetic, traffic))
    return np.asarray(both + START_S)


def attention_seconds(flops: Array, keys: Array, width: Array, peak_flop_s: Array, reach: Array) -> Array:
    """Seconds of fused attention in a forward pass.

    Args:
        flops: of the pairs that the mask leaves.
        keys: that a query sees, twice the mean: the length of a sequence under a causal mask.
        width: channels of a head.
        peak_flop_s: of the chip.
        reach: what it comes to of that in endless sequences with heads of 128 channels.
    """
    short = keys / (keys + half_length(peak_flop_s))
    narrow = 1.25 * width / (width + 32.0)
    return np.asarray(flops / (peak_flop_s * reach * np.maximum(short * narrow, 1e-3)))


def half_length(peak_flop_s: Array) -> Array:
    """The sequence at which attention reaches half of its best: 500 on an A100, longer on faster chips."""
    return np.asarray(500.0 * np.sqrt(peak_flop_s / 312e12))


def smooth_max(first: Array, second: Array, power: float = 4.0) -> Array:
    """The larger of two times, a little more where they are alike: neither hides the other wholly."""
    return np.asarray((first**power + second**power) ** (1 / power))


def beyond(time: Array, hidden: Array, power: float = 4.0) -> Array:
    """What is left of `time` behind work of length `hidden` that it runs beside."""
    return np.asarray(smooth_max(time, hidden, power) - hidden)
