"""Settings of the process that make the same arithmetic faster: `tune()` probes each, keeps what helps, and says so.

A command calls it once, at its start; importing zoo changes nothing.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from zoo.native.library import library

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2
"""Parameters of glibc's `mallopt` (malloc.h)."""
_TOP_PAD_BYTES = 64 * 2**20
EXACT = 1e-6
"""The largest error of an fp32 product, relative to the largest value, that still counts as fp32."""
FASTER = 1.05
"""What another route has to gain in the probe, so that noise does not decide."""
_SHAPES = ((512, 512, 512), (256, 1024, 1024))
"""Rows, inputs, outputs of the products that are probed."""


@cache
def tune() -> tuple[str, ...]:
    """Set up this process; what was decided, one line each with its reason. A second call changes nothing."""
    return tuple(line for line in (_keep_memory(), _route_products(), _load_kernels()) if line)


def _keep_memory() -> str | None:
    """glibc takes large blocks from the system and gives them back, so that every tensor is cleared page by page."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return "allocator as it is: the C library has no mallopt"
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, _TOP_PAD_BYTES))
    taken = [mallopt(name, value) for name, value in settings]
    if not all(taken):
        return "allocator as it is: mallopt refuses"
    return "allocator: freed memory stays with the process, so that the next tensor is not cleared page by page"


def _route_products() -> str | None:
    """oneDNN instead of the BLAS for fp32 products, where it is as exact and faster.

    torch takes this route when it is allowed bf16, but only processors with matrix units for bf16 then round to it.
    """
    matmul = _matmul()
    if matmul is None or not torch.backends.mkldnn.is_available():
        return None
    before = matmul.fp32_precision
    plain, routed = _seconds(before), _seconds("bf16")
    error = _error("bf16")
    gain = plain / routed
    if error < EXACT and gain > FASTER:
        matmul.fp32_precision = "bf16"
        return f"fp32 products by oneDNN: {gain:.2f} times as fast here, the largest error {error:.0e}"
    matmul.fp32_precision = before
    why = (
        f"oneDNN rounds to an error of {error:.0e}" if error >= EXACT else f"oneDNN takes {1 / gain:.2f} times as long"
    )
    return f"fp32 products by the BLAS: {why}"


def _load_kernels() -> str:
    """The compiled kernels, which the experts take wherever they are loaded."""
    if library() is None:
        return "experts grouped: no compiled kernels here"
    return "experts compiled where they are gated silu in fp32: one kernel call for all of them, tokens sorted once"


def _matmul() -> Any:
    """torch's settings of oneDNN's products; None in a torch without them."""
    return getattr(torch.backends.mkldnn, "matmul", None)


def _seconds(precision: str) -> float:
    """Of the products of `_SHAPES` by one route, each at its median."""
    _matmul().fp32_precision = precision
    return sum(_median(_product(*shape)) for shape in _SHAPES)


def _product(rows: int, inputs: int, outputs: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, inputs, generator=generator) for n in (rows, outputs))
    result = torch.empty(rows, outputs)
    return lambda: torch.mm(x, weight.t(), out=result)


def _median(run: Callable[[], object], rounds: int = 9) -> float:
    run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _error(precision: str) -> float:
    """The largest error of a product by one route against fp64, relative to the largest value."""
    _matmul().fp32_precision = precision
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(128, 256, generator=generator) for _ in range(2))
    exact = x.double() @ weight.double().t()
    return float(((x @ weight.t()).double() - exact).abs().max() / exact.abs().max())
