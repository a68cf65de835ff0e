"""What one pass over one token of each row does, in order."""

from __future__ import annotations

import ctypes
from collections import Counter, defaultdict
from collections.abc import Callable
from ctypes import Structure
from typing import Any

import torch
from torch import Tensor, nn

from zoo.blocks.adapted import Adapted
from zoo.blocks.base import Context
from zoo.blocks.rope import rotary_tables
from zoo.native.calls import DTYPES, PassInfo, Program
from zoo.spec.rope import RopeSpec


class Steps:
    """Programs of compiled calls, and between them functions in Python, all working on the same buffers.

    Args:
        rows: tokens of a pass, one of each sequence.
        dtype: of the model, which functions in Python are given.
        start: the first token that will be passed, counted from 0.
        num_new: how many passes there will be at most.
        padding: [b] int64 or None, as in `Context`.
    """

    def __init__(
        self, library: ctypes.CDLL, rows: int, dtype: torch.dtype, start: int, num_new: int, padding: Tensor | None
    ) -> None:
        self.rows, self.dtype, self.padding = rows, dtype, padding
        self.info = PassInfo(start, None if padding is None else padding.data_ptr())
        self.context = Context(torch.tensor([[start]]))
        first = start if padding is None else max(0, start - int(padding.max()))
        self._positions = torch.arange(first, start + num_new)[None]
        self._library = library
        self._parts: list[Program | Callable[[], object]] = []
        self._before: list[Callable[[], object]] = []
        self._tables: dict[tuple[RopeSpec, int], tuple[Tensor, Tensor]] = {}
        self._pool: defaultdict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = defaultdict(list)
        self._taken: Counter[tuple[tuple[int, ...], torch.dtype]] = Counter()

    def call(self, arguments: Structure, *keep: Any, wait: bool = True) -> None:
        """Add a compiled call; see `Program.call`."""
        program = self._parts[-1] if self._parts else None
        if not isinstance(program, Program):
            program = Program(self._library)
            self._parts.append(program)
        program.call(arguments, *keep, wait=wait)

    def python(self, function: Callable[[], object]) -> None:
        """Add a function in Python."""
        self._parts.append(function)

    def before(self, function: Callable[[], object]) -> None:
        """Call `function` before every pass."""
        self._before.append(function)

    def buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor for use until `reuse` is called: later ones then have the same memory."""
        made, place = self._pool[shape, dtype], self._taken[shape, dtype]
        self._taken[shape, dtype] += 1
        if place == len(made):
            made.append(torch.zeros(shape, dtype=dtype))
        return made[place]

    def reuse(self) -> None:
        """Free all buffers for what is added from now on."""
        self._taken.clear()

    def tables(self, rope: RopeSpec, dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin [positions, dim / 2] fp32 of all positions that will be passed, the first being `table_start`."""
        if (rope, dim) not in self._tables:
            cos, sin = rotary_tables(rope, dim, Context(self._positions))
            self._tables[rope, dim] = cos[0].contiguous(), sin[0].contiguous()
        return self._tables[rope, dim]

    @property
    def table_start(self) -> int:
        return int(self._positions[0, 0])

    @property
    def num_python(self) -> int:
        """Functions in Python in a pass."""
        return sum(not isinstance(part, Program) for part in self._parts)

    def run(self, past: int, context: Context) -> None:
        """Pass one token of each row."""
        self.info.past, self.context = past, context
        for function in self._before:
            function()
        for part in self._parts:
            if isinstance(part, Program):
                part.run()
            else:
                part()


def fit(module: nn.Module) -> bool:
    """Whether the kernels can read all numbers of `module`, and nothing else wants to know of its calls."""
    dtypes = set()
    for part in module.modules():
        if part._forward_hooks or part._forward_pre_hooks or isinstance(part, Adapted):
            return False
        exact = getattr(part, "exact_parameters", ())
        for name, parameter in part.named_parameters(recurse=False):
            if not readable(parameter):
                return False
            if name not in exact:
                dtypes.add(parameter.dtype)
    return len(dtypes) <= 1


def readable(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and tensor.device.type == "cpu" and tensor.dtype in DTYPES and tensor.is_contiguous()
