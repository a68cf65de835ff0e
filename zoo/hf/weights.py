"""The rows of a weight table: which stored tensor is which part of which parameter.

A stored tensor and its place in the model are two views of equal shape, so one table serves for loading (copy to the
right) and saving (copy to the left). `{n}` stands for the number of a layer, `{e}` for that of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from zoo.spec.base import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
View = Callable[["Tensor"], "Tensor"]
Known = Callable[[str], bool]
"""Whether a checkpoint holds a tensor of this name."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint and its place in the model."""

    name: str
    shape: Shape
    zoo: str
    """The parameter, by its name in the model."""
    view: View
    """Where in the parameter it stands."""


class WeightRow(Protocol):
    """One statement of a weight table."""

    @property
    def zoo(self) -> str:
        """The parameter that the row speaks of."""

    def stored(self, layer: str, shape: Shape, known: Known) -> Iterator[Stored]:
        """The stored tensors that the parameter of one layer consists of.

        Args:
            layer: its number.
            shape: of the parameter.
            known: tells between layouts, where there are several.
        """


@dataclass(frozen=True)
class Same:
    """A parameter that is stored as it is. Of several names, the first that is known counts, or the first of all."""

    zoo: str
    names: tuple[str, ...]

    def stored(self, layer: str, shape: Shape, known: Known) -> Iterator[Stored]:
        names = [name.format(n=layer) for name in self.names]
        yield Stored(next(filter(known, names), names[0]), shape, self.zoo.format(n=layer), _whole)


@dataclass(frozen=True)
class Experts:
    """Stacked experts [e, parts * f, d], stored as one matrix for each expert and part, or stacked as they are."""

    zoo: str
    parts: tuple[str, ...]
    """Names of the matrices of one expert, from the top."""
    stacked: str

    def stored(self, layer: str, shape: Shape, known: Known) -> Iterator[Stored]:
        zoo, stacked = self.zoo.format(n=layer), self.stacked.format(n=layer)
        if known(stacked):
            yield Stored(stacked, shape, zoo, _whole)
            return
        rows = shape[1] // len(self.parts)
        for expert in range(shape[0]):
            for index, part in enumerate(self.parts):
                view = partial(_rows, expert=expert, start=index * rows, stop=(index + 1) * rows)
                yield Stored(part.format(n=layer, e=expert), (rows, *shape[2:]), zoo, view)


def _whole(parameter: Tensor) -> Tensor:
    return parameter


def _rows(parameter: Tensor, expert: int, start: int, stop: int) -> Tensor:
    return parameter[expert, start:stop]


def _nothing(name: str) -> bool:
    del name
    return False


_LAYER = re.compile(r"layers\.(\d+)\.")


def stored_tensors(
    rows: Iterable[WeightRow], parameters: Mapping[str, Shape], known: Known = _nothing
) -> Iterator[Stored]:
    """The stored tensors of a whole model, in the model's order.

    Args:
        parameters: shapes by name, buffers that are saved included.
        known: whether a checkpoint holds a name; by default the layout of the hub is taken.

    Raises:
        ConfigError: the table does not name a parameter.
    """
    table = {row.zoo: row for row in rows}
    for name, shape in parameters.items():
        layer = _LAYER.match(name)
        row = table.get(_LAYER.sub("layers.{n}.", name, count=1))
        if row is None:
            raise ConfigError(f"{name}: the family has no name for this parameter")
        yield from row.stored(layer[1] if layer else "", shape, known)
