"""Python source of nested calls in which every argument says where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple


class Code(str):
    """An expression, not a text."""

    __slots__ = ()


class Field(NamedTuple):
    """One setting."""

    name: str
    value: Any
    """A literal, `Code` or a `Call`."""
    origin: str = ""
    """Who decided it. Calls inside of calls may leave it to their arguments."""


@dataclass(frozen=True)
class Call:
    """A function or class with the arguments that it is called with."""

    name: str
    fields: tuple[Field, ...]

    def __getitem__(self, path: str) -> Any:
        """The value of an argument by its dotted path.

        Raises:
            KeyError: there is none.
        """
        name, _, rest = path.partition(".")
        for field in self.fields:
            if field.name == name:
                return field.value[rest] if rest else field.value
        raise KeyError(path)


def source(call: Call, indent: int = 0) -> str:
    """The call as source, an argument a line, from its name on."""
    pad = " " * (indent + 4)
    lines = [f"{call.name}("]
    for field in call.fields:
        comment = f"  # {field.origin}" if field.origin else ""
        if isinstance(field.value, Call):
            head, *rest = source(field.value, indent + 4).split("\n")
            lines += [f"{pad}{field.name}={head}{comment}", *rest[:-1], f"{rest[-1]},"]
        else:
            lines.append(f"{pad}{field.name}={literal(field.value)},{comment}")
    return "\n".join([*lines, f"{' ' * indent})"])


def literal(value: Any) -> str:
    """A value as source; whole numbers that are floats keep their point."""
    return str(value) if isinstance(value, Code) else repr(value)


def runs(values: Sequence[Any]) -> Code:
    """A list of equal runs as the sum of its runs: `[0] * 3 + [1] * 58`."""
    parts = [(literal(value), len(list(same))) for value, same in groupby(values)]
    if len(parts) > len(values) / 2:
        return Code(f"[{', '.join(literal(value) for value in values)}]")
    return Code(" + ".join(f"[{text}] * {count}" if count > 1 else f"[{text}]" for text, count in parts))
