"""Files of every format, record by record: lines of JSON, rows of tables, whole texts."""

from __future__ import annotations

import codecs
import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from zoo.spec.base import ConfigError, near


class Markup(bytes):
    """Text that a chat template wrote: what looks like a special token in it is one."""


Part = tuple[bytes | memoryview, bool]
"""A piece of a document in UTF-8, and whether it is learned or only read."""
Found = tuple[Part, ...] | str
"""A document, or the reason why there is none."""
Record = tuple[int, int, Found]
"""Its number in its file, from 0; how many bytes of the file have been read up to its end; what it holds."""

MAX_DOCUMENT_BYTES = 1 << 30
"""A longer line or text is refused: it is in memory as a whole, and a small packed file may unpack to any length."""
TABLES = (".parquet", ".arrow", ".feather")
_ROWS = 256
_PIECE_BYTES = 16 << 20


def read_file(path: Path, keys: tuple[str, ...], skip: int = 0) -> Iterator[Record]:
    """The records of a file; its suffix gives the format, a last suffix `.gz` or `.zst` the packing.

    Args:
        keys: The key of a line, or the column of a table, that holds the text; or that of a prompt before it, and it.
        skip: Records at the beginning that are passed over, without a look at what they hold.

    Raises:
        ConfigError: not of its format, no such column, or a library is missing.
        OSError: cannot be read. EOFError, zlib.error: the packing is damaged.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] and suffixes[-1] in TABLES:
        yield from _read_table(path, keys, skip)
        return
    packing = suffixes.pop() if suffixes[-1:] in ([".gz"], [".zst"]) else ""
    with open(path, "rb") as raw, _unpacked(raw, path, packing) as stream:
        if suffixes[-1:] == [".jsonl"]:
            yield from _read_lines(raw, stream, partial(parts_of, keys=keys), skip)
        elif not skip:
            text = _read_text(stream)
            yield 0, raw.tell(), _too_long(text) or ((text, True),)


def _read_text(stream: IO[bytes] | gzip.GzipFile) -> bytes:
    """All of a stream, or a little more than a document may have; one read of so many bytes would reserve them."""
    pieces, room = [], MAX_DOCUMENT_BYTES + 1
    while room > 0 and (piece := stream.read(min(room, _PIECE_BYTES))):
        pieces.append(piece)
        room -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_rows(path: Path, make: Callable[[Any], Found], skip: int = 0) -> Iterator[Record]:
    """The records of a file of JSON lines, packed or not, each what `make` makes of it.

    Raises:
        ConfigError: a library is missing. OSError: cannot be read. EOFError, zlib.error: the packing is damaged.
    """
    packing = path.suffix.lower()
    with open(path, "rb") as raw, _unpacked(raw, path, packing if packing in (".gz", ".zst") else "") as stream:
        yield from _read_lines(raw, stream, make, skip)


def parts_of(row: Any, keys: tuple[str, ...], setting: str = "key") -> Found:
    """The document of a row {key: text}: its text, after a prompt if there are two keys."""
    if not isinstance(row, dict):
        return f"an object with the key {keys[-1]!r} is needed, not {json_type(row)}"
    parts: list[Part] = []
    for place, key in enumerate(reversed(keys)):
        if key not in row:
            which = "data.prompt_key" if place else "data.text_key"
            return f"no {setting} {key!r}; {setting}s: {', '.join(list(row)[:8]) or 'none'}; set {which}"
        if not isinstance(row[key], str):
            return f"{key!r} must be a string, not {json_type(row[key])}"
        try:
            parts.insert(0, (row[key].encode("utf-8"), not place))
        except UnicodeEncodeError as error:  # half of a surrogate pair
            return f"not text: {error}"
    return tuple(parts)


@contextmanager
def _unpacked(raw: IO[bytes], path: Path, packing: str) -> Iterator[IO[bytes] | gzip.GzipFile]:
    if packing == ".gz":
        with gzip.GzipFile(fileobj=raw) as stream:
            yield stream
    elif packing == ".zst":
        pa = _pyarrow(path)
        with _arrow_errors(path, "zstd"), io.BufferedReader(pa.CompressedInputStream(raw, "zstd")) as unpacked:
            yield unpacked
    else:
        yield raw


def _read_lines(
    raw: IO[bytes], stream: IO[bytes] | gzip.GzipFile, make: Callable[[Any], Found], skip: int
) -> Iterator[Record]:
    """Lines by their number; empty ones count, and are no documents."""
    number = -1
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        reason = _too_long(line)
        if number == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        while reason and line and not line.endswith(b"\n"):
            line = stream.readline(MAX_DOCUMENT_BYTES)
        if number >= skip and not line.isspace():
            yield number, raw.tell(), reason or _parts_of_line(line, make)


def _too_long(text: bytes) -> str:
    return f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB" if len(text) > MAX_DOCUMENT_BYTES else ""


def _parts_of_line(line: bytes, make: Callable[[Any], Found]) -> Found:
    try:
        row = json.loads(line.rstrip().decode())
    except json.JSONDecodeError as error:
        return f"not JSON at column {error.colno}: {error.msg.removesuffix(' at')}"
    except (ValueError, RecursionError) as error:
        return f"not JSON in UTF-8: {error}"
    return make(row)


def json_type(value: Any) -> str:
    """What a value of JSON is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _read_table(path: Path, keys: tuple[str, ...], skip: int) -> Iterator[Record]:
    pa = _pyarrow(path)
    size, number = path.stat().st_size, skip
    parquet = path.suffix.lower() == ".parquet"
    with _arrow_errors(path, "Parquet" if parquet else "Arrow"):
        for batch, share in (_parquet_batches if parquet else _arrow_batches)(path, keys, skip):
            columns = [_texts(pa, batch.column(key)) for key in keys]
            for row in zip(*columns, strict=True):
                parts = tuple((text, key == keys[-1]) for key, text in zip(keys, row, strict=True))
                yield number, int(share * size), "null, not text" if None in row else parts
                number += 1


def _texts(pa: Any, column: Any) -> list[bytes | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column.validate(full=True)  # offsets in a damaged file may point anywhere
    texts: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return texts


def _parquet_batches(path: Path, keys: tuple[str, ...], skip: int) -> Iterator[tuple[Any, float]]:
    """Batches after the first `skip` rows, each with the share of the file that has been read."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        _check_columns(file.schema_arrow, path, keys)
        groups, total, done = range(file.num_row_groups), max(1, file.metadata.num_rows), 0
        while groups and done + file.metadata.row_group(groups[0]).num_rows <= skip:
            done += file.metadata.row_group(groups[0]).num_rows
            groups = groups[1:]
        for batch in file.iter_batches(batch_size=_ROWS, row_groups=list(groups), columns=list(keys)):
            done += batch.num_rows
            if done > skip:
                yield _after(batch, done, skip), done / total


def _arrow_batches(path: Path, keys: tuple[str, ...], skip: int) -> Iterator[tuple[Any, float]]:
    """The same for the file format and the stream format of Arrow, which does not know its length."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            file = pa.ipc.open_file(source)
            total = file.num_record_batches
            batches = map(file.get_batch, range(total))
        except pa.ArrowInvalid:
            source.seek(0)
            file = batches = pa.ipc.open_stream(source)
            total = None
        _check_columns(file.schema, path, keys)
        done = 0
        for number, batch in enumerate(batches, 1):
            done += batch.num_rows
            if done > skip:
                share = number / total if total else source.tell() / source.size()
                yield _after(batch.select(list(keys)), done, skip), share


def _after(batch: Any, done: int, skip: int) -> Any:
    """The part of a batch, the last of `done` rows, that comes after the first `skip`."""
    return batch.slice(max(0, skip - done + batch.num_rows))


def _check_columns(schema: Any, path: Path, keys: tuple[str, ...]) -> None:
    for place, column in enumerate(reversed(keys)):
        setting = "data.prompt_key" if place else "data.text_key"
        if column not in schema.names:
            hint = near(column, schema.names) or f"columns: {', '.join(schema.names)}"
            raise ConfigError(f"{setting}: found {column!r}; no such column in {path}; {hint}")
        kind = str(schema.field(column).type)
        if kind not in ("string", "large_string", "string_view") and not kind.startswith("dictionary<values=string"):
            raise ConfigError(f"{setting}: found {column!r}; this column of {path} holds {kind}, not text")


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError:
        advice = "pip install 'moe-zoo[data]'"
        raise ConfigError(f"data.paths: found '{path}'; {path.suffix} needs the package pyarrow; {advice}") from None
    return pyarrow


@contextmanager
def _arrow_errors(path: Path, name: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(f"data.paths: found '{path}'; not readable as {name}: {error}") from error
