"""How long this machine takes for each kind of operation that training is made of, measured in a few seconds.

Results go into memory that was taken before, and into a ring of it that no
cache holds, because training writes activations that it reads again much later.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.plan.local import Rates

_ROUNDS = 7
_SAMPLE_S = 0.02
"""For all calls of one sample."""
_SIZES = (2**12, 2**14, 2**16, 2**18, 2**20, 2**22)
"""Elements of elementwise operations."""
_NOTHING = 64
"""Elements of an operation that costs its call alone."""
_RING_BYTES = 2**26
_KEPT_BYTES = 7 * 2**22
"""Once so much was freed at once, smaller tensors come from memory that is kept (mallopt(3), M_MMAP_THRESHOLD)."""
_ROW = 64
"""Elements of a row, where an operation works on rows."""
_PRODUCTS = (
    (1, 512, 512, 512),
    (1, 2048, 192, 192),
    (1, 2048, 768, 256),
    (1, 192, 512, 2048),
    (1, 2048, 64, 256),
    (1, 2048, 8, 256),
    (1, 8, 256, 2048),
    (1, 16, 512, 512),
    (1, 64, 512, 512),
    (1, 2048, 256, 16),
    (1, 256, 64, 64),
    (1, 64, 64, 64),
    (96, 64, 64, 64),
    (48, 128, 64, 128),
    (256, 32, 32, 32),
    (32, 64, 16, 64),
    (32, 64, 64, 16),
    (24, 256, 256, 32),
)
_ATTENTION = ((64, 32), (256, 32), (256, 64), (1024, 32), (1024, 128), (256, 128))
"""Queries and width."""
_PAIRS = 2**20
"""Pairs of a query and a key in a sample of attention, over all heads."""


def measure_rates() -> Rates:
    """Measure this processor."""
    threads_awake()
    op_s, plain_op_s = _eager_ops()
    return Rates(
        op_s=op_s,
        plain_op_s=plain_op_s,
        curves={kind: _curve(make, size_of) for kind, (make, size_of) in _ELEMENTWISE.items()},
        products=[(*shape, _product(*shape)) for shape in _PRODUCTS],
        attention=_attention(),
        fresh_byte_s=_fresh(),
        adamw=_update(_adamw),
        clip=_update(_clip),
    )


def threads_awake() -> None:
    """Have all threads started, and the C library keep freed memory, as it does after a few steps of training."""
    for _ in range(3):
        torch.ones(_KEPT_BYTES // 4).add_(1)


def seconds_of(
    call: Callable[[], object], budget_s: float = _SAMPLE_S, before: Callable[[], object] | None = None
) -> float:
    """The median of some calls, after one that is not counted.

    Args:
        before: done before every call, in its own time.
    """
    call()
    found: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(found) < 3 or (len(found) < _ROUNDS * 3 and time.perf_counter() < deadline):
        if before is not None:
            before()
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


Make = Callable[[Tensor, Tensor, Tensor], Callable[[], object]]
"""From two inputs and an output, [n] each, to an operation on them."""


def _stream(x: Tensor, y: Tensor, out: Tensor) -> Callable[[], object]:
    return lambda: torch.add(x, y, out=out)


def _math(x: Tensor, y: Tensor, out: Tensor) -> Callable[[], object]:
    return lambda: torch.sigmoid(x, out=out)


def _strided(x: Tensor, y: Tensor, out: Tensor) -> Callable[[], object]:
    turned = x.view(-1, 2, 4, 8).transpose(1, 2)
    place = out.view(-1, 4, 2, 8)
    return lambda: place.copy_(turned)


def _reduce(x: Tensor, y: Tensor, out: Tensor) -> Callable[[], object]:
    rows = x.view(-1, _ROW)
    place = out[: len(rows)]
    return lambda: torch.sum(rows, -1, out=place)


def _select(x: Tensor, y: Tensor, out: Tensor) -> Callable[[], object]:
    mask = x > 0
    return lambda: torch.where(mask, x, y, out=out)


def _gather(x: Tensor, y: Tensor, out: Tensor) -> Callable[[], object]:
    rows, place = x.view(-1, _ROW), out.view(-1, _ROW)
    order = torch.randperm(len(rows))
    return lambda: torch.index_select(rows, 0, order, out=place)


def _sort(x: Tensor, y: Tensor, out: Tensor) -> Callable[[], object]:
    experts = (torch.rand(x.numel()) * 64).to(torch.uint8)
    return lambda: experts.sort(stable=True)


def _scan(x: Tensor, y: Tensor, out: Tensor) -> Callable[[], object]:
    rows, place = x.view(-1, _ROW), out.view(-1, _ROW)
    return lambda: torch.cumsum(rows, -1, out=place)


_ELEMENTWISE: dict[str, tuple[Make, Callable[[int], int]]] = {
    "stream": (_stream, lambda elements: 12 * elements),
    "math": (_math, lambda elements: elements),
    "strided": (_strided, lambda elements: elements),
    "reduce": (_reduce, lambda elements: elements),
    "select": (_select, lambda elements: elements),
    "gather": (_gather, lambda elements: 4 * elements),
    "sort": (_sort, lambda elements: elements),
    "scan": (_scan, lambda elements: elements),
}


def _curve(make: Make, size_of: Callable[[int], int]) -> list[tuple[float, float]]:
    """Sizes, and seconds beside those of the same operation on next to nothing."""
    least = seconds_of(_in_a_ring(make, _NOTHING), _SAMPLE_S / 4)
    points = []
    for elements in _SIZES:
        seconds = seconds_of(_in_a_ring(make, elements)) - least
        points.append((float(size_of(elements)), max(seconds, 1e-12 * elements)))
    return points


def _in_a_ring(make: Make, elements: int) -> Callable[[], object]:
    number = max(1, min(16, _RING_BYTES // (4 * elements)))
    x, y = torch.rand(elements), torch.rand(elements)
    calls: Iterator[Callable[[], object]] = cycle([make(x, y, torch.ones(elements)) for _ in range(number)])
    return lambda: next(calls)()


def _product(stack: int, m: int, n: int, k: int) -> float:
    left, right = torch.rand(stack, m, k), torch.rand(stack, n, k).mT
    out = torch.empty(stack, m, n)
    if stack == 1:
        left, right, out = left[0], right[0], out[0]
        return seconds_of(lambda: torch.mm(left, right, out=out))
    return seconds_of(lambda: torch.bmm(left, right, out=out))


def _attention() -> dict[str, list[tuple[float, float, float]]]:
    found: dict[str, list[tuple[float, float, float]]] = {}
    for queries, width in _ATTENTION:
        heads = max(1, _PAIRS // queries**2)
        q, k, v = (torch.rand(1, heads, queries, width, requires_grad=True) for _ in range(3))
        seen = torch.ones(queries, queries, dtype=torch.bool).tril()[None, None]
        for name, mask in (("causal", None), ("masked", seen)):
            forward, backward = _both_ways(q, k, v, mask)
            work = heads * queries**2 * width
            found.setdefault(name, []).append((queries, width, forward / work))
            found.setdefault(f"{name}_back", []).append((queries, width, backward / work))
    return found


def _both_ways(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[float, float]:
    def attend() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)

    y = attend()
    grad = torch.ones_like(y)
    return seconds_of(attend), seconds_of(lambda: torch.autograd.grad(y, (q, k, v), grad, retain_graph=True))


def _fresh() -> float:
    """Seconds for a byte that the system hands out: filling memory that is new, less filling it again."""
    size = 2**24

    def anew() -> None:
        torch.empty(size).fill_(0.0)

    old = torch.empty(size)
    return max(0.0, seconds_of(anew) - seconds_of(lambda: old.fill_(0.0))) / (4 * size)


class _Counter(TorchDispatchMode):
    """How many operations are dispatched."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class _Small(nn.Module):
    """Operations in the mixture that models have, on next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.q, self.out = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        q = self.q(normed).unflatten(-1, (4, 8)).transpose(1, 2)
        turned = torch.cat((q[..., :4] * 2.0, -q[..., 4:]), -1)
        y = F.silu(turned.transpose(1, 2).flatten(-2))
        return x + self.out(y)


def _small_layers() -> nn.Module:
    return nn.Sequential(*(_Small() for _ in range(8)))


def _eager_ops() -> tuple[float, float]:
    """Seconds of an operation with nothing to do: in a forward and backward pass of modules, and in plain code."""
    layers = _small_layers()
    x, matrix = torch.rand(1, 4, 16), torch.rand(8, 8)

    def train() -> None:
        layers(x).sum().backward()

    def update() -> None:
        with torch.no_grad():
            for _ in range(16):
                gram = matrix @ matrix.mT
                matrix.mul_(0.5).add_(0.1 * gram + gram @ gram, alpha=1e-3)

    return _seconds_of_op(train), _seconds_of_op(update)


def _seconds_of_op(call: Callable[[], object]) -> float:
    call()
    with _Counter() as counter:
        call()
    return seconds_of(call, 4 * _SAMPLE_S) / counter.count


def _update(make: Callable[[list[nn.Parameter]], Callable[[], object]]) -> tuple[float, float, float]:
    """Seconds for each element, for each tensor, and for a call of an operation on all parameters at once."""
    large, many, one = [_parameters(number, size) for number, size in ((16, 2**17), (128, 16), (1, 16))]
    other = torch.ones(_RING_BYTES // 4)
    layers = _small_layers()

    def elsewhere() -> None:
        """What comes between two updates: code and data that leave none of theirs in a cache."""
        layers(torch.rand(1, 4, 16)).sum().backward()
        other.add_(1)

    call, some, all_of = (seconds_of(make(part), 3 * _SAMPLE_S, elsewhere) for part in (one, many, large))
    tensor = max(0.0, some - call) / 127
    return max(0.0, all_of - call - 15 * tensor) / (16 * 2**17), tensor, call


def _parameters(number: int, size: int) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.rand(size)) for _ in range(number)]
    for parameter in made:
        parameter.grad = torch.rand(size)
    return made


def _adamw(parameters: list[nn.Parameter]) -> Callable[[], object]:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True).step


def _clip(parameters: list[nn.Parameter]) -> Callable[[], object]:
    return lambda: nn.utils.clip_grad_norm_(parameters, 1e-3)
