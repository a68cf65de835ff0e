"""From a weight table to the stored tensors of a whole model: where a checkpoint holds each layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from zoo.hf.weights import JointRow, Known, Shape, Stored, WeightRow
from zoo.spec.base import ConfigError


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
    rename: Mapping[str, str] = field(default_factory=dict)
    """How stored names begin in the table, and how they begin here; with a dot before it, what stands inside."""

    def renamed(self, name: str) -> str:
        begins = next((begins for begins in self.rename if name.startswith(begins)), "")
        name = self.rename.get(begins, "") + name.removeprefix(begins)
        for inside in (part for part in self.rename if part.startswith(".")):
            name = name.replace(inside, self.rename[inside])
        return name


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
