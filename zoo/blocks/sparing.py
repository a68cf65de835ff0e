"""Keeping less for the backward pass: what is quickly made again from what is kept anyway is not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

Make = Callable[[], Tensor]


@contextmanager
def sparing(*results: tuple[Tensor, Make]) -> Iterator[None]:
    """Within, operations that keep one of `results`, or a view of it, for their backward pass have it made again then.

    The caller holds the results meanwhile. What makes one gives the same numbers in the same places, and must hold on
    to nothing that comes after it. Made once for all operations that kept it. Not to be used below a checkpoint, which
    keeps nothing and makes everything again.
    """
    recipes = {result.untyped_storage().data_ptr(): _Recipe(make) for result, make in results}

    def pack(tensor: Tensor) -> Any:
        if type(tensor) is not Tensor or tensor.is_leaf:
            return tensor
        recipe = recipes.get(tensor.untyped_storage().data_ptr())
        return tensor if recipe is None else recipe.view_of(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


class _Recipe:
    """How a tensor is made, and the tensor while some of the operations that kept it are still to come."""

    def __init__(self, make: Make) -> None:
        self.make = make
        self.made: Tensor | None = None
        self.kept = self.taken = 0

    def view_of(self, tensor: Tensor) -> _View:
        self.kept += 1
        return _View(self, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def take(self) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                self.made = self.make()
        made = self.made
        self.taken += 1
        if self.taken % self.kept == 0:
            self.made = None
        return made


class _View(NamedTuple):
    recipe: _Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _unpack(packed: Any) -> Tensor:
    if not isinstance(packed, _View):
        found: Tensor = packed
        return found
    return packed.recipe.take().as_strided(packed.size, packed.stride, packed.offset)
