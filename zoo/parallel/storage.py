"""Checkpoints that many processes write, on disk: tensors in pieces, and an index of them.

Every process writes one safetensors file with the pieces that fall to it, named NAME@OFFSETS. `tensors.json` says of
every tensor, by its name in the model, its whole shape and where its pieces lie. Nothing is pickled. A checkpoint of a
single process, two safetensors files with whole tensors, is read in the same way.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from zoo.spec.base import ConfigError
from zoo.train.rundir import TENSORS as INDEX
from zoo.train.rundir import flush

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where a piece lies: its offsets in the whole tensor, its shape, and its bytes in a file."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    places: tuple[Place, ...]


Index = dict[str, Entry]


def write_index(directory: Path, index: Mapping[str, Entry]) -> None:
    """Write the index of a checkpoint."""
    data = {
        name: {
            "dtype": _NAMES[entry.dtype],
            "shape": entry.shape,
            "pieces": [[place.offsets, place.shape, place.file, place.start] for place in entry.places],
        }
        for name, entry in index.items()
    }
    path = directory / INDEX
    path.write_text(json.dumps(data), encoding="utf-8")
    flush(path)


def read_index(directory: Path) -> Index:
    """The tensors of a checkpoint, written by many processes or by one.

    Raises:
        ConfigError: the index is unsound.
    """
    path = directory / INDEX
    if not path.is_file():
        return _whole_tensors(directory)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {name: _entry(directory, found) for name, found in data.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(f"{path}: not the index of a checkpoint ({error!r})") from None


def _entry(directory: Path, found: Mapping[str, Any]) -> Entry:
    dtype = DTYPES[found["dtype"]]
    places = []
    for offsets, shape, file, start in found["pieces"]:
        place = Place(tuple(map(int, offsets)), tuple(map(int, shape)), file, int(start))
        end = place.start + _num_bytes(dtype, place.shape)
        if Path(file).name != file or place.start < 0 or end > (directory / file).stat().st_size:
            raise ValueError(f"{file}: no piece at {start}")
        places.append(place)
    return Entry(dtype, tuple(map(int, found["shape"])), tuple(places))


def _whole_tensors(directory: Path) -> Index:
    index: Index = {}
    for path in sorted(directory.glob("*.safetensors")):
        header, begin = _header(path)
        for name, found in header.items():
            shape = tuple(found["shape"])
            place = Place((0,) * len(shape), shape, path.name, begin + found["data_offsets"][0])
            index[name] = Entry(DTYPES[found["dtype"]], shape, (place,))
    return index


def _header(path: Path) -> tuple[dict[str, Any], int]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # proves it sound
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a sound safetensors file: {error}") from None
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def write_pieces(path: Path, pieces: Sequence[tuple[str, Tensor]]) -> tuple[list[int], int]:
    """Write one safetensors file and wait until it is on disk; one piece at a time is copied to the host.

    Returns:
        The byte at which each piece starts, and the CRC-32 of the file.
    """
    # The widest numbers first, so that all of them are aligned.
    order = sorted(range(len(pieces)), key=lambda number: -pieces[number][1].dtype.itemsize)
    header: dict[str, Any] = {}
    starts, end = [0] * len(pieces), 0
    for number in order:
        name, piece = pieces[number]
        starts[number] = end
        end += piece.numel() * piece.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [starts[number], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        head = struct.pack("<Q", len(text)) + text
        file.write(head)
        crc = zlib.crc32(head)
        for number in order:
            flat = pieces[number][1].detach().to("cpu").contiguous().view(-1).view(torch.uint8)
            data = flat.numpy().data
            file.write(data)
            crc = zlib.crc32(data, crc)
        file.flush()
        os.fsync(file.fileno())
    return [len(head) + start for start in starts], crc


class Reader:
    """Boxes of the tensors of a checkpoint. Files are mapped: only what is asked for is read."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            ConfigError: the index is unsound.
        """
        self.directory = directory
        self.index = read_index(directory)
        self._maps: dict[str, mmap.mmap] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._maps.clear()

    def piece(self, name: str, place: Place) -> Tensor:
        """A piece as it is on disk; not to be written to, nor kept."""
        dtype = self.index[name].dtype
        count = _num_bytes(dtype, place.shape)
        if not count:
            return torch.empty(place.shape, dtype=dtype)
        if place.file not in self._maps:
            with (self.directory / place.file).open("rb") as file:
                self._maps[place.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(self._maps[place.file], dtype=torch.uint8, count=count, offset=place.start)
        # Pieces may begin at any byte; only a copy is aligned.
        return (flat if place.start % dtype.itemsize == 0 else flat.clone()).view(dtype).view(place.shape)

    def read(self, name: str) -> Tensor:
        """A whole tensor, put together."""
        entry = self.index[name]
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for place in entry.places:
            box = tuple(
                slice(offset, offset + length) for offset, length in zip(place.offsets, place.shape, strict=True)
            )
            whole[box] = self.piece(name, place)
        return whole


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    count = dtype.itemsize
    for length in shape:
        count *= length
    return count
