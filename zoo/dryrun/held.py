"""Storages as a meter sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(slots=True, eq=False)
class Held:
    """A storage."""

    nbytes: int
    kind: str
    counted: bool = True
    """It takes memory. False: it exists inside of a fused kernel alone."""
    alive: bool = True
    holds: int = 0
    """Fused results that are computed again from it."""
    sources: tuple[Held, ...] = ()
    """Of a fused result: what takes memory and is enough to compute it again."""
    costly: bool = False
    """Computing it again takes a scan."""
    narrow: Held | None = None
    """It is this storage in a wider dtype, which the next kernel reads instead."""
    fused: bool = False
    """A result of a fused kernel, whether it is written or not."""
    holding: bool = False
    """It counts among the `holds` of its sources."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of arguments or results."""
    if isinstance(value, Tensor):
        if not isinstance(value, DTensor):
            yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
