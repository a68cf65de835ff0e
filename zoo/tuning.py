"""Settings of the process that make the same arithmetic faster: `tune()` probes each, keeps what helps, and says so.

A command calls it once, at its start, unless `kernels.tune` is off; importing zoo changes nothing. What was found out
is kept in `cache_dir()`, so that a run goes on by the same routes as it began.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zoo.blocks import compiled
from zoo.blocks.experts import Experts
from zoo.hardware.speed import cache_dir, write_cache
from zoo.native.library import library, processor

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2
"""Parameters of glibc's `mallopt` (malloc.h)."""
_TOP_PAD_BYTES = 64 * 2**20
EXACT = 1e-6
"""The largest error of an fp32 product, relative to the largest value, that still counts as fp32."""
FASTER = 1.05
"""What another route has to gain in the probe, so that noise does not decide."""
_SHAPES = ((512, 512, 512), (256, 1024, 1024))
"""Rows, inputs, outputs of the products that are probed."""
_EXPERTS = (512, 256, 8, 2)
"""Tokens, width, experts and choices of the layer that is probed."""
_FORMAT = 1
"""Raised when the same machine would be probed otherwise."""


class Tuning(NamedTuple):
    """What was decided, one line each with its reason."""

    allocator: str
    threads: str
    products: str
    experts: str


@cache
def tune() -> Tuning:
    """Set up this process for work on the processor. A second call changes nothing."""
    return Tuning(_keep_memory(), _limit_threads(), _route_products(), _choose_experts())


def tuned() -> Tuning | None:
    """What `tune` decided in this process; None before it was called."""
    return tune() if tune.cache_info().currsize else None


def _keep_memory() -> str:
    """glibc takes large blocks from the system and gives them back, so that every tensor is cleared page by page."""
    if not sys.platform.startswith("linux"):
        return "allocator as it is: that of Linux alone is known to need help"
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return "allocator as it is: the C library has no mallopt"
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, _TOP_PAD_BYTES))
    taken = [mallopt(name, value) for name, value in settings]
    if not all(taken):
        return "allocator as it is: mallopt refuses"
    return "allocator: freed memory stays with the process, so that the next tensor is not cleared page by page"


def _limit_threads() -> str:
    """No more threads than a container's share of the processor pays for: the others would wait for their turn."""
    threads = torch.get_num_threads()
    try:
        share, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        paid = math.ceil(int(share) / int(period))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        paid = threads
    if "OMP_NUM_THREADS" in os.environ:
        return f"threads: {threads}, as OMP_NUM_THREADS says"
    if paid >= threads:
        return f"threads: {threads}, one for each core"
    torch.set_num_threads(paid)
    return f"threads: {paid} of {threads}, this container's share of the processor"


def _route_products() -> str:
    """oneDNN instead of the BLAS for fp32 products, where it is as exact and faster.

    torch takes this route when it is allowed bf16, but only processors with matrix units for bf16 then round to it.
    """
    matmul = _matmul()
    if matmul is None or not torch.backends.mkldnn.is_available():
        return "fp32 products by the BLAS: this torch has no other route"
    before = matmul.fp32_precision
    try:
        found = _kept("products", lambda: {"error": _error(), "gain": _gain(_by_blas(before), _by_onednn)})
    finally:
        matmul.fp32_precision = before
    error, gain = found["error"], found["gain"]
    if error >= EXACT:
        return f"fp32 products by the BLAS: oneDNN rounds to an error of {error:.0e}"
    if gain <= FASTER:
        return f"fp32 products by the BLAS: oneDNN is {gain:.2f} times as fast here"
    matmul.fp32_precision = "bf16"
    return f"fp32 products by oneDNN: {gain:.2f} times as fast here, the largest error {error:.0e}"


def _choose_experts() -> str:
    """The compiled kernel wherever it fits (`zoo.blocks.compiled`), unless torch's products are faster here."""
    if library() is None:
        return "experts grouped: no compiled kernels here; tokens are sorted by expert once"
    gain = _kept("experts", lambda: {"gain": _gain(_training("grouped"), _training("compiled"))})["gain"]
    compiled.prefer(gain * FASTER > 1)
    if not compiled.is_ready():
        return f"experts grouped: the compiled kernel is {gain:.2f} times as fast here"
    return f"experts compiled where they are gated silu in fp32: {gain:.2f} times as fast here as torch's products"


def _kept(what: str, probe: Callable[[], dict[str, float]]) -> Mapping[str, float]:
    """What `probe` finds, from the cache when this machine was probed before."""
    machine = [_FORMAT, what, processor(), torch.__version__, torch.get_num_threads()]
    name = hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:16]
    path = cache_dir() / f"tuning-{name}.json"
    try:
        return {key: float(value) for key, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        found = probe()
        write_cache(path, found)
        return found


def _matmul() -> Any:
    """torch's settings of oneDNN's products; None in a torch without them."""
    return getattr(torch.backends.mkldnn, "matmul", None)


def _gain(plain: Callable[[], object], other: Callable[[], object], rounds: int = 9) -> float:
    """How many times as fast the other way is: medians of calls in turns."""
    seconds: dict[Callable[[], object], list[float]] = {plain: [], other: []}
    for _ in range(rounds + 1):
        for run, times in seconds.items():
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(seconds[plain][1:]) / statistics.median(seconds[other][1:])


def _by_blas(precision: str) -> Callable[[], object]:
    return lambda: _products(precision)


def _by_onednn() -> None:
    _products("bf16")


def _products(precision: str) -> None:
    """The products of `_SHAPES` by one route."""
    _matmul().fp32_precision = precision
    for x, weight, result in _factors():
        torch.mm(x, weight.t(), out=result)


@cache
def _factors() -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]:
    return tuple(
        (_random(rows, inputs), _random(outputs, inputs), torch.empty(rows, outputs))
        for rows, inputs, outputs in _SHAPES
    )


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _error() -> float:
    """The largest error of a product by oneDNN against fp64, relative to the largest value."""
    _matmul().fp32_precision = "bf16"
    x, weight = _random(128, 256), _random(127, 256)
    exact = x.double() @ weight.double().t()
    return float(((x @ weight.t()).double() - exact).abs().max() / exact.abs().max())


def _training(backend: str) -> Callable[[], object]:
    """Forward and backward through experts; every random number is one of our own."""
    num_tokens, width, num_experts, top_k = _EXPERTS
    with torch.random.fork_rng(devices=[]):
        experts = Experts(width, num_experts, width, backend=backend)  # type: ignore[arg-type]
    x = _random(num_tokens, width).requires_grad_()
    indices = _random(num_tokens, num_experts).topk(top_k).indices

    def run() -> None:
        torch.autograd.grad(experts(x, None, indices).sum(), [x, *experts.parameters()])

    return run
