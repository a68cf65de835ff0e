"""The rows of a weight table: which stored tensor is which part of which parameter.

A stored tensor and its place in the model are two views of equal shape, so one table serves for loading (copy to the
right) and saving (copy to the left). `{n}` stands for the number of a layer, `{e}` for that of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

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
    stack: bool = False
    """Write them stacked."""

    def stored(self, layer: str, shape: Shape, known: Known) -> Iterator[Stored]:
        zoo, stacked = self.zoo.format(n=layer), self.stacked.format(n=layer)
        if known(stacked) or (self.stack and not known(self.parts[0].format(n=layer, e=0))):
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
class Led:
    """A vector that is stored as a matrix of one row."""

    zoo: str
    names: tuple[str, ...]

    def stored(self, layer: str, shape: Shape, known: Known) -> Iterator[Stored]:
        names = [name.format(n=layer) for name in self.names]
        yield Stored(next(filter(known, names), names[0]), (1, *shape), self.zoo.format(n=layer), _led)


@dataclass(frozen=True)
class Shaped:
    """A parameter that is stored with other axes."""

    zoo: str
    names: tuple[str, ...]
    shape: Shape

    def stored(self, layer: str, shape: Shape, known: Known) -> Iterator[Stored]:
        names = [name.format(n=layer) for name in self.names]
        view = partial(_viewed, shape=self.shape)
        yield Stored(next(filter(known, names), names[0]), self.shape, self.zoo.format(n=layer), view)


@dataclass(frozen=True)
class Flat:
    """Stacked experts [e, parts * f, d], stored as one matrix [e * f, d] for each part."""

    zoo: str
    parts: tuple[str, ...]
    """Names of the matrices, from the top."""
    transposed: bool = False
    """The parameter is [e, d, f] instead and has one part."""

    def stored(self, layer: str, shape: Shape, known: Known) -> Iterator[Stored]:
        experts, rows, width = (shape[0], shape[2], shape[1]) if self.transposed else shape
        rows //= len(self.parts)
        for index, part in enumerate(self.parts):
            view = _turned if self.transposed else partial(_band, start=index * rows, stop=(index + 1) * rows)
            stacked = partial(_grouped, groups=experts)
            yield Stored(part.format(n=layer), (experts * rows, width), self.zoo.format(n=layer), view, stacked)


@dataclass(frozen=True)
class Bands:
    """Stacked experts [e, parts * f, d], stored stacked too, as one tensor [e, f, d] for each part, or as they are."""

    zoo: str
    parts: tuple[str, ...]
    """Names of the tensors, from the top."""
    stacked: str

    def stored(self, layer: str, shape: Shape, known: Known) -> Iterator[Stored]:
        zoo, stacked = self.zoo.format(n=layer), self.stacked.format(n=layer)
        if known(stacked):
            yield Stored(stacked, shape, zoo, _whole)
            return
        rows = shape[1] // len(self.parts)
        for index, part in enumerate(self.parts):
            view = partial(_band, start=index * rows, stop=(index + 1) * rows)
            yield Stored(part.format(n=layer), (shape[0], rows, shape[2]), zoo, view)


@dataclass(frozen=True)
class Swapped:
    """A matrix whose left and right halves are stored the other way round."""

    zoo: str
    name: str

    def stored(self, layer: str, shape: Shape, known: Known) -> Iterator[Stored]:
        half = shape[1] // 2
        for mine, theirs in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
            view, part = partial(_columns, where=mine), partial(_columns, where=theirs)
            yield Stored(self.name.format(n=layer), shape, self.zoo.format(n=layer), view, part)


@dataclass(frozen=True)
class Interleaved:
    """Gates and ups [e, 2f, ...], stored row by row in turns; matrices have their last two axes exchanged."""

    zoo: str
    name: str

    def stored(self, layer: str, shape: Shape, known: Known) -> Iterator[Stored]:
        matrix = len(shape) > 2
        whole = (*shape[:-2], shape[-1], shape[-2]) if matrix else shape
        part = partial(_in_turns, turned=matrix)
        yield Stored(self.name.format(n=layer), whole, self.zoo.format(n=layer), _halves, part)


@dataclass(frozen=True)
class Fused:
    """Matrices or vectors that are stored as one, above each other in the order of `members`."""

    members: tuple[str, ...]
    name: str
    transposed: bool = False
    """The stored matrix has its last two axes exchanged."""
    groups: int = 1
    """The rows come in so many groups, each with an equal share of every member."""
    apart: tuple[str, ...] = ()
    """Names under which checkpoints of another layout hold the members apart."""

    def stored_jointly(self, layer: str, shapes: Mapping[str, Shape], known: Known) -> Iterator[Stored]:
        if self.apart and known(self.apart[0].format(n=layer)):
            for member, name in zip(self.members, self.apart, strict=True):
                yield Stored(name.format(n=layer), shapes[member], member.format(n=layer), _whole)
            return
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


def _viewed(parameter: Tensor, shape: Shape) -> Tensor:
    return parameter.view(shape)


def _led(parameter: Tensor) -> Tensor:
    return parameter[None]


def _band(parameter: Tensor, start: int, stop: int) -> Tensor:
    return parameter[:, start:stop]


def _columns(tensor: Tensor, where: slice) -> Tensor:
    return tensor[:, where]


def _halves(parameter: Tensor) -> Tensor:
    return parameter.unflatten(1, (2, -1))


def _in_turns(tensor: Tensor, turned: bool) -> Tensor:
    return (tensor.mT if turned else tensor).unflatten(1, (-1, 2)).transpose(1, 2)


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    return tensor.unflatten(0, (groups, -1))


def _rows_of(tensor: Tensor, start: int, stop: int, turned: bool, groups: int = 1) -> Tensor:
    upright = tensor.mT if turned else tensor
    return upright[start:stop] if groups == 1 else _grouped(upright, groups)[:, start:stop]


def _rows(parameter: Tensor, expert: int, start: int, stop: int) -> Tensor:
    return parameter[expert, start:stop]
