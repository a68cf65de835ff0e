"""A shard: the tokens of some documents in one safetensors file, mapped into memory and checked block by block.

Beside the tokens of both sides of the split (`train`, `heldout`) it holds a CRC-32 for each block of them, `learned`
masks where not every token is learned, and in its metadata where in the text it begins and ends. A shard is written at
once: it is whole or absent. What it says of its sizes is held against the size of the file before anything is mapped,
and no byte of it is trusted before its block was summed up.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from zoo.data.documents import Position, Side
from zoo.data.stream import Piece
from zoo.spec.base import ConfigError

FORMAT = 1
SIDES: tuple[Side, ...] = ("train", "heldout")
_BLOCK_BYTES = 1 << 16
"""Summed up in some 35 microseconds, once, when a row is first read from it."""
_MAX_HEADER_BYTES = 16 << 20
_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("<u1"), "U16": np.dtype("<u2"), "U32": np.dtype("<u4")}
_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Extent:
    """How much text one side of a shard, or of a corpus, holds."""

    num_documents: int = 0
    num_bytes: int = 0
    """UTF-8 bytes of the text that is learned, and one for each separator."""
    num_targets: int = 0
    """Tokens that are learned."""

    def __add__(self, other: Extent) -> Extent:
        return Extent(
            self.num_documents + other.num_documents,
            self.num_bytes + other.num_bytes,
            self.num_targets + other.num_targets,
        )

    @property
    def bytes_per_token(self) -> float:
        """Divide bits per token by this to get bits per byte."""
        return self.num_bytes / max(1, self.num_targets)


@dataclass(frozen=True)
class Facts:
    """What a shard says of itself."""

    key: str
    """Of the text and the tokenizer (`zoo.data.cache.key_of`)."""
    start: Position
    next: Position
    """Where the next shard goes on."""
    last: bool
    """Nothing comes after it."""
    cut: bool
    """The end of every document is held out, instead of whole documents."""
    extents: dict[Side, Extent]
    flaws: tuple[tuple[str, str], ...] = ()
    """Where there was no usable text, and why."""


@dataclass(frozen=True, eq=False)
class Shard:
    """Some documents as tokens."""

    facts: Facts
    pieces: dict[Side, Piece]


def write_shard(path: Path, shard: Shard) -> None:
    """Write a shard at once: a reader finds all of it, or nothing.

    Raises:
        OSError: it cannot be written.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    for side, piece in shard.pieces.items():
        arrays[side] = piece.tokens
        if piece.learned is not None:
            arrays[f"{side}.learned"] = piece.learned
    sizes = {name: array.nbytes for name, array in arrays.items()}
    facts = json.dumps({"format": FORMAT, "sizes": sizes, **_plain(shard.facts)})
    arrays |= {f"{name}.crc32": _sums(np.ascontiguousarray(array).view(np.uint8)) for name, array in arrays.items()}
    content = save(arrays, {"facts": f"{zlib.crc32(facts.encode()):08x} {facts}"})
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def open_shard(path: Path) -> Shard:
    """Map a shard into memory.

    Raises:
        ConfigError: its header is damaged, or the file has another size than it says. Damage elsewhere is found when
            it is read.
    """
    try:
        content = np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.empty(0, np.uint8)
        arrays, facts = _parse(content)
        pieces = {side: _piece(path, arrays, side) for side in SIDES}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, str(error) or type(error).__name__) from None
    return Shard(facts, pieces)


def check_all(shard: Shard) -> None:
    """Read all of a shard.

    Raises:
        ConfigError: it is damaged.
    """
    for piece in shard.pieces.values():
        piece.check(0, len(piece.tokens))


def damaged(path: Path, reason: str) -> ConfigError:
    """The error for a shard that cannot be used."""
    advice = "delete that file: it is made anew from the text when training starts again"
    return ConfigError(f"data: the tokens in {path} are damaged ({reason}); {advice}")


class _Blocks:
    """An array on disk that is compared with its sums, each block once, before it is read."""

    def __init__(self, path: Path, name: str, array: npt.NDArray[Any], sums: npt.NDArray[np.uint32]) -> None:
        self._path, self._name, self._sums = path, name, sums
        self._bytes: _Bytes = array.view(np.uint8)
        self._itemsize = array.itemsize
        self._unseen = np.ones(len(sums), np.bool_)
        if len(sums) != -(-len(self._bytes) // _BLOCK_BYTES):
            raise ValueError(f"{len(self._bytes)} bytes of {name} have {len(sums)} sums")

    def check(self, start: int, stop: int) -> None:
        if start >= stop:
            return
        first = start * self._itemsize // _BLOCK_BYTES
        end = (stop * self._itemsize - 1) // _BLOCK_BYTES + 1
        if not self._unseen[first:end].any():
            return
        for block in range(first, end):
            at = block * _BLOCK_BYTES
            if self._unseen[block] and zlib.crc32(self._bytes[at : at + _BLOCK_BYTES].data) != self._sums[block]:
                raise damaged(self._path, f"{self._name} has changed between bytes {at} and {at + _BLOCK_BYTES}")
        self._unseen[first:end] = False


def _piece(path: Path, arrays: Mapping[str, npt.NDArray[Any]], side: Side) -> Piece:
    checks = []
    for name in (side, f"{side}.learned"):
        if name in arrays:
            checks.append(_Blocks(path, name, arrays[name], arrays[f"{name}.crc32"]).check)
    learned = arrays.get(f"{side}.learned")
    if learned is not None and (learned.dtype != np.uint8 or len(learned) != len(arrays[side])):
        raise ValueError(f"{side}.learned does not fit its tokens")

    def check(start: int, stop: int) -> None:
        for one in checks:
            one(start, stop)

    return Piece(arrays[side], learned, check)


def _sums(content: _Bytes) -> npt.NDArray[np.uint32]:
    starts = range(0, len(content), _BLOCK_BYTES)
    return np.array([zlib.crc32(content[at : at + _BLOCK_BYTES].data) for at in starts], np.uint32)


def _parse(content: _Bytes) -> tuple[dict[str, npt.NDArray[Any]], Facts]:
    """The arrays of a safetensors file, and the facts in its metadata."""
    if len(content) < 8:
        raise ValueError(f"it has {len(content)} bytes")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    if start > min(len(content), _MAX_HEADER_BYTES):
        raise ValueError(f"its header is said to have {start - 8} bytes")
    header = json.loads(content[8:start].tobytes().decode("utf-8"))
    said, _, facts = header.pop("__metadata__")["facts"].partition(" ")
    if said != f"{zlib.crc32(facts.encode()):08x}":
        raise ValueError("its facts have changed")
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, entry in header.items():
        arrays[name] = _array(content[start:], name, entry)
    if sum(array.nbytes for array in arrays.values()) != len(content) - start:
        raise ValueError("its header does not fit the size of the file")
    return arrays, _facts(json.loads(facts), arrays)


def _array(data: _Bytes, name: str, entry: Mapping[str, Any]) -> npt.NDArray[Any]:
    dtype = _DTYPES[entry["dtype"]]
    (length,) = entry["shape"]
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(data) or end - begin != length * dtype.itemsize or begin % dtype.itemsize:
        raise ValueError(f"{name} is said to lie at {begin} to {end} of {len(data)} bytes")
    return data[begin:end].view(dtype)


def _plain(facts: Facts) -> dict[str, Any]:
    return {**vars(facts), "extents": {side: vars(extent) for side, extent in facts.extents.items()}}


def _facts(plain: dict[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> Facts:
    if plain.pop("format") != FORMAT:
        raise ValueError("it was written by another version of zoo")
    sizes = plain.pop("sizes")
    if arrays.keys() != {name for array in sizes for name in (array, f"{array}.crc32")}:
        raise ValueError(f"it holds {', '.join(sorted(arrays))}")
    if any(arrays[name].nbytes != size for name, size in sizes.items()):
        raise ValueError("its arrays have other sizes than it says")
    extents: dict[Side, Extent] = {side: Extent(**plain["extents"][side]) for side in SIDES}
    places = {name: Position(*plain[name]) for name in ("start", "next")}
    flaws = tuple((where, reason) for where, reason in plain["flaws"])
    return Facts(**{**plain, **places, "extents": extents, "flaws": flaws})
