"""The head of a GGUF file: its metadata, and where its tensors lie.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the package gguf takes seconds for
the vocabularies that files carry; this one takes a tenth of one.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.spec.base import ConfigError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values, by the letters of the module struct."""
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    shape: tuple[int, ...]
    """Rows first, unlike in the file."""
    type: int
    """A number of `gguf.GGMLQuantizationType`."""
    start: int
    """Its first byte in the file."""


class _Cursor:
    """Reads little-endian values from the beginning of a file on."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, letter: str, count: int = 1) -> tuple[Any, ...]:
        size = struct.calcsize(letter) * count
        if size > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += size
        return struct.unpack_from(f"<{count}{letter}", self.data, self.at - size)

    def number(self, letter: str = "Q") -> Any:
        return self.take(letter)[0]

    def text(self) -> str:
        length = self.number()
        if length > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.take("I")[0], self.number()
            if inner in _NUMBERS:
                return list(self.take(_NUMBERS[inner], count))
            if inner != _STRING or count > len(self.data):
                raise ValueError(f"an array of {count} values of type {inner}")
            return [self.text() for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"a value of type {kind}")
        return self.number(_NUMBERS[kind])


def read_head(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The metadata and the tensors of a GGUF file.

    Raises:
        ConfigError: it is none, is cut, or is of a version or byte order that is not read.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parsed(_Cursor(data))
    except (ValueError, struct.error, OSError) as error:
        raise ConfigError(f"{path}: not a sound GGUF file: {error}") from None


def _parsed(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    if bytes(cursor.take("B", 4)) != MAGIC:
        raise ValueError("it does not begin like one")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}; read are {', '.join(map(str, _VERSIONS))}, little-endian")
    num_tensors, num_settings = cursor.take("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(num_settings):
        name = cursor.text()
        metadata[name] = cursor.value(cursor.number("I"))
    found = [_tensor(cursor) for _ in range(num_tensors)]
    return metadata, dict(_placed(found, cursor, metadata))


def _tensor(cursor: _Cursor) -> tuple[str, StoredTensor]:
    name, dims = cursor.text(), cursor.number("I")
    if dims > _MAX_DIMS:
        raise ValueError(f"{name} has {dims} axes")
    shape = cursor.take("Q", dims)
    kind, offset = cursor.number("I"), cursor.number()
    return name, StoredTensor(shape[::-1], kind, offset)


def _placed(
    found: list[tuple[str, StoredTensor]], cursor: _Cursor, metadata: Mapping[str, Any]
) -> list[tuple[str, StoredTensor]]:
    """Tensors whose offsets count from the beginning of the file, which holds all of them."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    data = math.ceil(cursor.at / alignment) * alignment
    if len({name for name, _ in found}) < len(found):
        raise ValueError("two tensors have one name")
    return [(name, StoredTensor(tensor.shape, tensor.type, data + tensor.start)) for name, tensor in found]
