"""The rows of a weight table: which stored tensor is which part of which parameter.

A stored tensor and its place in the model are two views of equal shape, so one table serves for loading (copy to the
right) and saving (copy to the left). `{n}` stands for the number of a layer, `{e}` for that of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

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
    part: View | None = None
    """Which part of the tensor stands there, where it also holds other parameters; None: all of it."""


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


@runtime_checkable
class JointRow(Protocol):
    """A statement about several parameters of one layer that are parts of the same stored tensor."""

    @property
    def members(self) -> tuple[str, ...]:
        """The parameters that the row speaks of; a model may lack some of them."""

    def stored_jointly(self, layer: str, shapes: Mapping[str, Shape], known: Known) -> Iterator[Stored]:
        """The stored tensors of those members that the layer has, one after the other.

        Args:
            layer: its number.
            shapes: of the layer's members, by their names in the table.
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


@dataclass(frozen=True)
class Transposed:
    """A matrix that is stored with its last two axes exchanged."""

    zoo: str
    name: str

    def stored(self, layer: str, shape: Shape, known: Known) -> Iterator[Stored]:
        turned = (*shape[:-2], shape[-1], shape[-2])
        yield Stored(self.name.format(n=layer), turned, self.zoo.format(n=layer), _turned)


@dataclass(frozen=True)
class Fused:
    """Matrices or vectors that are stored as one, above each other in the order of `members`."""

    members: tuple[str, ...]
    name: str
    transposed: bool = False
    """The stored matrix has its last two axes exchanged."""
    groups: int = 1
    """The rows come in so many groups, each with an equal share of every member."""

    def stored_jointly(self, layer: str, shapes: Mapping[str, Shape], known: Known) -> Iterator[Stored]:
        turned = self.transposed and len(next(iter(shapes.values()))) > 1
        height = sum(shape[0] for shape in shapes.values())
        whole: Shape = (height, *next(iter(shapes.values()))[1:])
        start = 0
        for member, shape in shapes.items():
            stop = start + shape[0] // self.groups
            part = partial(_rows_of, start=start, stop=stop, turned=turned, groups=self.groups)
            start = stop
            stored = whole[::-1] if turned else whole
            view = partial(_grouped, groups=self.groups) if self.groups > 1 else _whole
            yield Stored(self.name.format(n=layer), stored, member.format(n=layer), view, part)


@dataclass(frozen=True)
class Split:
    """A parameter whose rows are stored as several tensors, from the top, or as one."""

    zoo: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    """Rows of each part."""
    whole: str

    def stored(self, layer: str, shape: Shape, known: Known) -> Iterator[Stored]:
        zoo, whole = self.zoo.format(n=layer), self.whole.format(n=layer)
        if known(whole):
            yield Stored(whole, shape, zoo, _whole)
            return
        start = 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            view = partial(_rows_of, start=start, stop=start + size, turned=False)
            yield Stored(part.format(n=layer), (size, *shape[1:]), zoo, view)
            start += size


def _whole(parameter: Tensor) -> Tensor:
    return parameter


def _turned(parameter: Tensor) -> Tensor:
    return parameter.mT


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    return tensor.unflatten(0, (groups, -1))


def _rows_of(tensor: Tensor, start: int, stop: int, turned: bool, groups: int = 1) -> Tensor:
    upright = tensor.mT if turned else tensor
    return upright[start:stop] if groups == 1 else _grouped(upright, groups)[:, start:stop]


def _rows(parameter: Tensor, expert: int, start: int, stop: int) -> Tensor:
    return parameter[expert, start:stop]


def _nothing(name: str) -> bool:
    del name
    return False


Rows = tuple[WeightRow | JointRow, ...]


@dataclass(frozen=True)
class Home:
    """Where a checkpoint holds a layer's tensors."""

    number: str = ""
    """What stands for `{n}` in its stored names."""
    rows: Rows = ()
    """Statements that hold in this layer alone, before those that hold in all."""
    rename: tuple[str, str] = ("", "")
    """How stored names begin in the table, and how they begin here."""

    def renamed(self, name: str) -> str:
        before, after = self.rename
        return after + name.removeprefix(before) if before and name.startswith(before) else name


_HOME = re.compile(r"(?:mtp\.\d+\.)?layers\.(?P<layer>\d+)\.|mtp\.(?P<block>\d+)\.")


def stored_tensors(
    rows: Iterable[WeightRow | JointRow],
    parameters: Mapping[str, Shape],
    known: Known = _nothing,
    homes: Mapping[str, Home] | None = None,
) -> Iterator[Stored]:
    """The stored tensors of a whole model, in the model's order.

    Args:
        parameters: shapes by name, buffers that are saved included.
        known: whether a checkpoint holds a name; by default the layout of the hub is taken.
        homes: of layers, by what names of their parameters begin with: `layers.3.`, `mtp.0.`, `mtp.0.layers.0.`. Tables
            call all of them `layers.{n}.`, or `mtp.{n}.` for what a block of multi-token prediction has beside layers.

    Raises:
        ConfigError: the table does not name a parameter.
    """
    everywhere, homes = _table(rows), homes or {}
    tables = {prefix: {**everywhere, **_table(home.rows)} for prefix, home in homes.items()}
    for name, shape in parameters.items():
        match = _HOME.match(name)
        prefix, number = (match[0], match["layer"] or match["block"]) if match else ("", "")
        alias = "" if match is None else "layers.{n}." if match["layer"] else "mtp.{n}."
        home = homes.get(prefix) or Home(number)
        row = tables.get(prefix, everywhere).get(alias + name.removeprefix(prefix))
        if row is None:
            raise ConfigError(f"{name}: the family has no name for this parameter")
        if isinstance(row, JointRow):
            owned = {member: prefix + member.removeprefix(alias) for member in row.members}
            shapes = {member: parameters[own] for member, own in owned.items() if own in parameters}
            if owned[next(iter(shapes))] != name:
                continue
            found = row.stored_jointly(home.number, shapes, partial(_held, known, home))
        else:
            found = row.stored(home.number, shape, partial(_held, known, home))
        for stored in found:
            own = prefix + stored.zoo.removeprefix(alias.format(n=home.number))
            yield replace(stored, name=home.renamed(stored.name), zoo=own)


def _held(known: Known, home: Home, name: str) -> bool:
    return known(home.renamed(name))


def _table(rows: Iterable[WeightRow | JointRow]) -> dict[str, WeightRow | JointRow]:
    table: dict[str, WeightRow | JointRow] = {}
    for row in rows:
        table |= dict.fromkeys(_named(row), row)
    return table


def _named(row: WeightRow | JointRow) -> tuple[str, ...]:
    return row.members if isinstance(row, JointRow) else (row.zoo,)
