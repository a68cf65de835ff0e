"""Documents one by one: found on disk in a fixed order, read, and checked to be text."""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
import platform
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from zoo.spec.base import ConfigError, near
from zoo.spec.data import DataSpec, FilesData, StdlibData

_NOT_EVERYWHERE = frozenset(
    "site-packages dist-packages __pycache__ lib-dynload "
    "test tests idle_test idlelib lib2to3 distutils ensurepip macholib tkinter turtledemo".split()
)
"""Folders below the standard library that are no part of it, or that some distributions leave out."""
_LOCAL = ("_sysconfigdata", "_distutils_system_mod", "sitecustomize", "usercustomize", "python-config")
"""Files that begin so are written when Python is built or packaged, and differ from machine to machine."""


@dataclass(frozen=True)
class Source:
    """A file to read."""

    name: str
    """Below the library's root (`stdlib`), or as the user writes it (`files`); with forward slashes."""
    path: Path


@dataclass(frozen=True)
class Document:
    """A text that belongs, as a whole, to one side of the split."""

    key: bytes
    """What the split looks at."""
    text: bytes
    """UTF-8 without the byte 0."""


@dataclass(frozen=True)
class Flaw:
    """A line, row or file that holds no usable text."""

    where: str
    """`file` or `file:line`."""
    reason: str


def find_sources(data: DataSpec) -> list[Source]:
    """The files of a corpus, sorted by name, so that no order of a directory listing shows.

    Raises:
        ConfigError: there are none.
    """
    if isinstance(data, StdlibData):
        return _stdlib_sources(Path(sysconfig.get_path("stdlib")))
    if isinstance(data, FilesData):
        paths = {os.path.realpath(path): path for pattern in data.paths for path in _match(pattern)}
        return [Source(paths[real].as_posix(), paths[real]) for real in sorted(paths)]
    raise TypeError(f"no reader for {type(data).__qualname__}")


def read_documents(data: DataSpec, sources: list[Source]) -> Iterator[Document | Flaw]:
    """Every document of `sources` in order, one in memory at a time; in its place a `Flaw` where there is no text.

    Raises:
        ConfigError: a file cannot be read at all.
    """
    for source in sources:
        try:
            for where, text in _read(data, source):
                flaw = text if isinstance(text, str) else _flaw(text)
                if flaw:
                    yield Flaw(where, flaw)
                elif isinstance(text, bytes):
                    # Files of the library keep their side when Python is updated; equal texts share a side elsewhere.
                    yield Document(os.fsencode(source.name) if isinstance(data, StdlibData) else text, text)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"data: found '{source.path}'; cannot be read: {error}") from error


def _stdlib_sources(root: Path) -> list[Source]:
    if not (root / "os.py").is_file():
        raise ConfigError(
            f"data.type: found 'stdlib'; this Python {platform.python_version()} has no source files of its library "
            f"in {root}; use another Python, or texts of your own: data=files data.paths=[texts/]"
        )
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_EVERYWHERE]
        found += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith(_LOCAL)]
    return sorted((Source(path.relative_to(root).as_posix(), path) for path in found), key=lambda source: source.name)


def _match(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    matches = [path] if path.exists() else [Path(match) for match in glob.glob(str(path), recursive=True)]
    files = [file for match in matches for file in ([match] if not match.is_dir() else _walk(match))]
    if not files:
        siblings = os.listdir(path.parent) if path.parent.is_dir() else []
        rule = "holds no files" if path.is_dir() else f"matches no file or directory, seen from {Path.cwd()}"
        hint = near(path.name, siblings) or "give files, directories or quoted patterns"
        raise ConfigError(f"data.paths: found {pattern!r}; {rule}; {hint}")
    return files


def _walk(root: Path) -> list[Path]:
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        seen.add(real)  # a link may lead back up
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return found


def _read(data: DataSpec, source: Source) -> Iterator[tuple[str, bytes | str]]:
    """Where a document stands, and its bytes; a string instead says why there are none."""
    suffixes = [suffix.lower() for suffix in source.path.suffixes]
    if isinstance(data, FilesData) and suffixes[-1:] == [".parquet"]:
        yield from _read_parquet(source, data.text_key)
        return
    packed = isinstance(data, FilesData) and suffixes[-1:] == [".gz"]
    with gzip.open(source.path) if packed else open(source.path, "rb") as file:
        if isinstance(data, FilesData) and ".jsonl" in (suffixes[-2:] if packed else suffixes[-1:]):
            yield from _read_jsonl(file, source, data.text_key)
        else:
            yield source.name, file.read()


def _read_jsonl(file: IO[bytes] | gzip.GzipFile, source: Source, key: str) -> Iterator[tuple[str, bytes | str]]:
    for number, line in enumerate(file, start=1):
        if not line.isspace():
            yield f"{source.name}:{number}", _text_of_line(line, key)


def _text_of_line(line: bytes, key: str) -> bytes | str:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        return f"not JSON at column {error.colno}: {error.msg.removesuffix(' at')}"
    except (ValueError, RecursionError) as error:
        return f"not JSON in UTF-8: {error}"
    if not isinstance(row, dict):
        return f"an object with the key {key!r} is needed, not {_json_type(row)}"
    if key not in row:
        return f"no key {key!r}; keys: {', '.join(list(row)[:8]) or 'none'}; set data.text_key"
    if not isinstance(row[key], str):
        return f"{key!r} must be a string, not {_json_type(row[key])}"
    try:
        return row[key].encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair
        return f"not text: {error}"


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _read_parquet(source: Source, column: str) -> Iterator[tuple[str, bytes | str]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise ConfigError(
            f"data.paths: found '{source.path}'; Parquet needs the package pyarrow; pip install pyarrow"
        ) from None
    number = 0
    try:
        with pq.ParquetFile(source.path) as file:
            _check_column(file.schema_arrow, source, column)
            for batch in file.iter_batches(batch_size=64, columns=[column]):
                texts = batch.column(0)
                if pa.types.is_dictionary(texts.type):
                    texts = texts.dictionary_decode()
                for value in texts.cast(pa.large_binary()).to_pylist():
                    number += 1
                    yield f"{source.name}:{number}", "null, not text" if value is None else value
    except pa.ArrowException as error:
        raise ConfigError(f"data.paths: found '{source.path}'; not readable as Parquet: {error}") from error


def _check_column(schema: Any, source: Source, column: str) -> None:
    if column not in schema.names:
        hint = near(column, schema.names) or f"columns: {', '.join(schema.names)}"
        raise ConfigError(f"data.text_key: found {column!r}; no such column in {source.path}; {hint}")
    kind = str(schema.field(column).type)
    if kind not in ("string", "large_string", "string_view") and not kind.startswith("dictionary<values=string"):
        raise ConfigError(f"data.text_key: found {column!r}; this column of {source.path} holds {kind}, not text")


def _flaw(text: bytes) -> str:
    """Why `text` cannot be a document; empty when it can."""
    if b"\0" in text:
        return f"not text: byte 0 at offset {text.index(0)}"
    decoder = codecs.getincrementaldecoder("utf-8")()
    step = 1 << 20  # decoded in steps, so that a large text is never in memory a second time
    try:
        for start in range(0, len(text), step):
            decoder.decode(text[start : start + step], final=start + step >= len(text))
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason} near byte {start + error.start}"
    return ""
