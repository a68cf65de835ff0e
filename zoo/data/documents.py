"""Documents one by one: found in a fixed order, read from any place in it, and checked to be text."""

from __future__ import annotations

import codecs
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from zoo.data import hub
from zoo.data.chat import conversation, load_template
from zoo.data.formats import Part, Record, read_file, read_rows
from zoo.data.paths import library_files, matching_files
from zoo.spec.base import ConfigError
from zoo.spec.data import ChatData, DataSpec, HFData, MixtureData, PathsSpec, RecordsSpec, SplitSpec, StdlibData

Side = Literal["train", "heldout"]
_DECODED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Source:
    """A file or a data set to read."""

    name: str
    """Below the library's root (`stdlib`), or as the user writes it; with forward slashes."""
    path: Path
    side: Side | None = None
    """What all of it is for; None: each document goes by its hash."""


class Position(NamedTuple):
    """A place in the order of all documents."""

    source: int = 0
    """Index of the source."""
    record: int = 0
    """Line, row or document of the source, from 0."""


START = Position()


class Document(NamedTuple):
    """A text that belongs, as a whole, to one side of the split."""

    key: bytes
    """What the split looks at."""
    parts: tuple[Part, ...]
    """UTF-8 without the byte 0, in pieces that are learned or only read."""
    source: int = 0
    """Index of its source."""
    record: int = 0
    """Its number in that source."""
    end: int = 0
    """Bytes of the source that have been read up to its end."""

    @property
    def next(self) -> Position:
        """Where to read on after it."""
        return Position(self.source, self.record + 1)

    @property
    def text(self) -> bytes:
        """All parts together."""
        return _joined(self.parts)


class Flaw(NamedTuple):
    """A line, row or file that holds no usable text."""

    where: str
    """`file` or `file:line`."""
    reason: str
    source: int = 0
    record: int = 0

    @property
    def next(self) -> Position:
        """Where to read on after it."""
        return Position(self.source, self.record + 1)


def find_sources(data: DataSpec) -> list[Source]:
    """What a corpus is read from, in order.

    Raises:
        ConfigError: there is nothing.
    """
    if isinstance(data, MixtureData):
        return [source for part in data.sources.values() for source in find_sources(part)]
    if isinstance(data, StdlibData):
        root = Path(sysconfig.get_path("stdlib"))
        return [Source(path.relative_to(root).as_posix(), path) for path in library_files(root)]
    if isinstance(data, PathsSpec):
        return _file_sources(data)
    if isinstance(data, HFData):
        splits: list[tuple[str, Side | None]] = [(data.split, None)]
        if data.heldout_split:
            splits = [(data.split, "train"), (data.heldout_split, "heldout")]
        path = hub.find(data)
        return [Source(split, path, side) for split, side in splits]
    raise TypeError(f"no reader for {type(data).__qualname__}")


def read_documents(data: SplitSpec, sources: list[Source], start: Position = START) -> Iterator[Document | Flaw]:
    """Every document of `sources` from `start` on, one in memory at a time; a `Flaw` where there is no text.

    Raises:
        ConfigError: a file cannot be read at all.
    """
    for index in range(start.source, len(sources)):
        source = sources[index]
        skip = start.record if index == start.source else 0
        try:
            for number, end, found in _read(data, source, skip):
                flaw = found if isinstance(found, str) else _flaw(found)
                if flaw:
                    yield Flaw(_where(data, source, number), flaw, index, number)
                elif not isinstance(found, str):
                    # Files of the library keep their side when Python is updated; equal texts share a side elsewhere.
                    key = os.fsencode(source.name) if isinstance(data, StdlibData) else _joined(found)
                    yield Document(key, found, index, number, end)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"data: found '{source.path}'; cannot be read: {error}") from error


def _file_sources(data: PathsSpec) -> list[Source]:
    train = matching_files(data.paths, "data.paths")
    if not data.heldout_paths:
        return [Source(path.as_posix(), path) for path in train]
    heldout = matching_files(data.heldout_paths, "data.heldout_paths")
    if both := {os.path.realpath(path) for path in train} & {os.path.realpath(path) for path in heldout}:
        rule = f"{min(both)} is also one of data.paths; a model is not judged by what it has learned"
        raise ConfigError(f"data.heldout_paths: found {list(data.heldout_paths)}; {rule}")
    sources = [Source(path.as_posix(), path, "train") for path in train]
    return sources + [Source(path.as_posix(), path, "heldout") for path in heldout]


def _read(data: SplitSpec, source: Source, skip: int) -> Iterator[Record]:
    if isinstance(data, StdlibData):
        return iter([] if skip else [(0, source.path.stat().st_size, ((source.path.read_bytes(), True),))])
    assert isinstance(data, RecordsSpec)
    if isinstance(data, ChatData):
        make = partial(conversation, key=data.text_key, template=load_template(data.template))
        return read_rows(source.path, make, skip)
    keys = (data.text_key,) if data.prompt_key is None else (data.prompt_key, data.text_key)
    if isinstance(data, HFData):
        return hub.read(data, source.name, keys, skip)
    return read_file(source.path, keys, skip)


def _joined(parts: tuple[Part, ...]) -> bytes:
    return bytes(parts[0][0]) if len(parts) == 1 else b"".join(text for text, _ in parts)


def _where(data: SplitSpec, source: Source, number: int) -> str:
    if isinstance(data, HFData):
        return f"{data.path} {source.name}:{number + 1}"
    suffixes = {suffix.lower() for suffix in source.path.suffixes[-2:]}
    rows = isinstance(data, PathsSpec) and suffixes & {".jsonl", ".parquet", ".arrow", ".feather"}
    return f"{source.name}:{number + 1}" if rows else source.name


def _flaw(parts: tuple[Part, ...]) -> str:
    """Why a document cannot be used; empty when it can."""
    for text, _ in parts:
        data = bytes(text)
        if b"\0" in data:
            return f"not text: byte 0 at offset {data.index(0)}"
        if len(data) <= _DECODED_AT_ONCE:
            try:
                data.decode()
            except UnicodeDecodeError as error:
                return f"not UTF-8: {error.reason} near byte {error.start}"
        elif flaw := _flaw_of_long(data):
            return flaw
    return ""


def _flaw_of_long(data: bytes) -> str:
    """Why a text is not UTF-8; decoded in steps, so that a large text is never in memory a second time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(data), _DECODED_AT_ONCE):
            decoder.decode(data[start : start + _DECODED_AT_ONCE], final=start + _DECODED_AT_ONCE >= len(data))
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} near byte {start + error.start}"
    return ""
