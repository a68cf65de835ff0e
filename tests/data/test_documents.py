"""Finding and reading documents: every format, and every way in which a text can be unusable."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo.data import documents, formats
from zoo.data.documents import Document, Flaw, Position, find_sources, read_documents
from zoo.spec.base import ConfigError
from zoo.spec.data import FilesData, StdlibData


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(*paths: str, **settings: Any) -> FilesData:
    return FilesData(paths=paths, **settings)


def names(data: FilesData | StdlibData) -> list[str]:
    return [source.name for source in find_sources(data)]


def read(data: FilesData) -> list[bytes | str]:
    return [
        document.text if isinstance(document, Document) else f"{document.where}: {document.reason}"
        for document in read_documents(data, find_sources(data))
    ]


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_files_directories_and_patterns(folder: Path) -> None:
    for name in ("a.txt", "d/b.md", "d/e/c.py", "d/.hidden", "d/.git/x", "odd[1].txt"):
        write(folder / name, name)
    assert names(files("d", "a.txt")) == ["a.txt", "d/b.md", "d/e/c.py"]
    assert names(files("**/*.py", "*.txt", "d/e")) == ["a.txt", "d/e/c.py", "odd[1].txt"]
    assert names(files("odd[1].txt")) == ["odd[1].txt"]
    assert names(files("a.txt", str(folder / "a.txt"), "./a.txt"))[1:] == []


def test_linked_directories_are_followed_once(folder: Path) -> None:
    write(folder / "real/a.txt", "a")
    (folder / "d").mkdir()
    os.symlink(folder / "real", folder / "d/link")
    os.symlink(folder / "d", folder / "real/back")
    assert names(files("d")) == ["d/link/a.txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "text.txt",
            r"^data\.paths: found 'text\.txt'; matches no file or directory, seen from .*; did you mean texts\.txt",
        ),
        ("*.csv", r"^data\.paths: found '\*\.csv'; matches no file .* holds empty texts\.txt$"),
        ("nowhere/x", r"^data\.paths: found 'nowhere/x'; matches no file"),
        ("empty", r"^data\.paths: found 'empty'; holds no files"),
    ],
)
def test_paths_that_name_nothing(folder: Path, pattern: str, message: str) -> None:
    write(folder / "texts.txt", "a")
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        find_sources(files("texts.txt", pattern))


def test_text_files_are_documents_as_they_are(folder: Path) -> None:
    write(folder / "a.txt", "zw\u00f6lf\r\n")
    write(folder / "b.rst", "")
    (folder / "c.md.gz").write_bytes(gzip.compress(b"packed"))
    assert read(files(".")) == ["zw\u00f6lf\r\n".encode(), b"", b"packed"]


def test_what_is_not_text_is_named(folder: Path) -> None:
    write(folder / "a.png", b"\x89PNG\0\0")
    write(folder / "b.txt", b"x" * (1 << 20) + b"\xe9t\xe9")
    write(folder / "c.txt", ("x" * ((1 << 20) - 1) + "\u00e9").encode())
    assert read(files("a.png", "b.txt")) == [
        "a.png: not text: byte 0 at offset 4",
        "b.txt: not UTF-8: invalid continuation byte near byte 1048576",
    ]
    assert len(read(files("c.txt"))[0]) == (1 << 20) + 1


LINES = [
    b'\xef\xbb\xbf{"text": "one", "id": 1}',
    b"",
    '{"text": "zw\u00f6lf\\n"}'.encode(),
    b'{"text": "cut',
    b'{"id": 1}',
    b"[1]",
    b'{"text": 3}',
    b'{"text": null}',
    b'{"text": "\\ud800"}',
    b'{"text": "a\\u0000"}',
    b'{"text": "\xff"}',
    b"[" * 100_000,
    b'{"text": ""}',
]
READ = [
    b"one",
    "zw\u00f6lf\n".encode(),
    "a.jsonl:4: not JSON at column 10: Unterminated string starting",
    "a.jsonl:5: no key 'text'; keys: id; set data.text_key",
    "a.jsonl:6: an object with the key 'text' is needed, not a list",
    "a.jsonl:7: 'text' must be a string, not a number",
    "a.jsonl:8: 'text' must be a string, not null",
    "a.jsonl:9: not text: 'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed",
    "a.jsonl:10: not text: byte 0 at offset 1",
]


@pytest.mark.parametrize("packed", [False, True])
def test_json_lines(folder: Path, packed: bool) -> None:
    content = b"\n".join(LINES)
    name = "a.jsonl.gz" if packed else "a.jsonl"
    write(folder / name, gzip.compress(content) if packed else content)
    found = read(files(name))
    assert found[: len(READ)] == [
        line.replace("a.jsonl:", f"{name}:") if isinstance(line, str) else line for line in READ
    ]
    assert [str(flaw)[: len(name) + 24] for flaw in found[len(READ) : -1]] == [
        f"{name}:11: not JSON in UTF-8: ",
        f"{name}:12: not JSON in UTF-8: ",
    ]
    assert found[-1] == b""


def test_another_key(folder: Path) -> None:
    write(folder / "a.jsonl", json.dumps({"content": "x", "text": 1}))
    assert read(files("a.jsonl", text_key="content")) == [b"x"]


def test_parquet(folder: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = [f"row {number}" for number in range(150)]
    texts[70] = None
    column = pa.array(texts)
    for name, values in {"a": column, "b": column.dictionary_encode(), "c": column.cast(pa.large_string())}.items():
        pq.write_table(pa.table({"id": range(150), "text": values}), folder / f"{name}.parquet", row_group_size=40)
        found = read(files(f"{name}.parquet"))
        assert found.pop(70) == f"{name}.parquet:71: null, not text"
        assert found == [text.encode() for text in texts if text]
    with pytest.raises(
        ConfigError, match=r"^data\.text_key: found 'test'; no such column in a\.parquet; did you mean text"
    ):
        read(files("a.parquet", text_key="test"))
    with pytest.raises(
        ConfigError, match=r"^data\.text_key: found 'id'; this column of a\.parquet holds int64, not text$"
    ):
        read(files("a.parquet", text_key="id"))


def arrow_file(path: Path, table: Any, kind: str, rows: int) -> None:
    pa = pytest.importorskip("pyarrow")
    make = {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}[kind]
    with make(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("name", ["a.arrow", "a.feather"])
def test_arrow(folder: Path, kind: str, name: str) -> None:
    pa = pytest.importorskip("pyarrow")
    texts = [f"row {number}" for number in range(150)]
    arrow_file(folder / name, pa.table({"id": range(150), "text": texts}), kind, 40)
    assert read(files(name)) == [text.encode() for text in texts]
    with pytest.raises(ConfigError, match=rf"^data\.text_key: found 'test'; no such column in {name}; did"):
        read(files(name, text_key="test"))


def test_packed_by_zstandard(folder: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    for name, content in {"a.jsonl.zst": b"\n".join(LINES[:3]), "b.txt.zst": b"packed"}.items():
        with pa.CompressedOutputStream(folder / name, "zstd") as stream:
            stream.write(content)
    assert read(files("a.jsonl.zst", "b.txt.zst")) == [*READ[:2], b"packed"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "file.arrow", "stream.arrow"])
def test_reading_goes_on_anywhere(folder: Path, name: str) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"text": [f"row {number}" for number in range(100)]})
    lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()
    if name.endswith("parquet"):
        pq.write_table(table, folder / name, row_group_size=30)
    elif name.endswith("arrow"):
        arrow_file(folder / name, table, name.removesuffix(".arrow"), 30)
    elif name.endswith("zst"):
        with pa.CompressedOutputStream(folder / name, "zstd") as stream:
            stream.write(lines)
    else:
        write(folder / name, gzip.compress(lines) if name.endswith("gz") else lines)
    write(folder / "z.txt", "end")
    data = files(name, "z.txt")
    sources = find_sources(data)
    whole = list(read_documents(data, sources))
    assert len(whole) == 101
    for start in (0, 1, 29, 30, 31, 60, 99, 100):
        assert list(read_documents(data, sources, Position(0, start))) == whole[start:]
        assert whole[start].next == Position(int(start == 100), 1 if start == 100 else start + 1)
    assert list(read_documents(data, sources, Position(1, 0))) == whole[100:]
    assert list(read_documents(data, sources, Position(1, 1))) == []
    ends = [document.end for document in whole[:-1]]
    assert ends == sorted(ends)
    assert 0 < ends[-1] <= (folder / name).stat().st_size


def test_prompts_are_read_and_not_learned(folder: Path) -> None:
    write(folder / "a.jsonl", '{"text": "yes", "ask": "really?"}\n{"text": "yes"}\n{"text": "yes", "ask": 1}\n')
    data = files("a.jsonl", prompt_key="ask")
    first, second, third = read_documents(data, find_sources(data))
    assert isinstance(first, Document)
    assert first.parts == ((b"really?", False), (b"yes", True))
    assert first.key == first.text == b"really?yes"
    assert isinstance(second, Flaw)
    assert (second.where, second.reason) == ("a.jsonl:2", "no key 'ask'; keys: text; set data.prompt_key")
    assert isinstance(third, Flaw)
    assert third.reason == "'ask' must be a string, not a number"


def test_prompts_in_tables(folder: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["yes", None], "ask": ["really?", "no?"]}), folder / "a.parquet")
    data = files("a.parquet", prompt_key="ask")
    first, second = read_documents(data, find_sources(data))
    assert isinstance(first, Document)
    assert first.parts == ((b"really?", False), (b"yes", True))
    assert isinstance(second, Flaw)
    with pytest.raises(ConfigError, match=r"^data\.prompt_key: found 'asks'; no such column .* mean ask"):
        read(files("a.parquet", prompt_key="asks"))


def test_held_out_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.txt", "held/c.txt"):
        write(folder / name, name)
    sources = find_sources(files("*.txt", heldout_paths=["held"]))
    assert [(source.name, source.side) for source in sources] == [
        ("a.txt", "train"),
        ("b.txt", "train"),
        ("held/c.txt", "heldout"),
    ]
    with pytest.raises(ConfigError, match=r"^data\.heldout_paths: found \['b\.txt'\]; .*b\.txt is also one of"):
        find_sources(files("*.txt", heldout_paths=["b.txt"]))
    with pytest.raises(ConfigError, match=r"^data\.heldout_paths: found 'd\.txt'; matches no file"):
        find_sources(files("*.txt", heldout_paths=["d.txt"]))
    monkeypatch.setenv("HOME", str(folder))
    assert names(files("~/a.txt")) == [str(folder / "a.txt")]


def test_endless_lines_and_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_DOCUMENT_BYTES", 1 << 20)
    write(folder / "a.jsonl.gz", gzip.compress(b"x" * (5 << 20) + b'\n{"text": "short"}\n'))
    write(folder / "b.txt.gz", gzip.compress(b"x" * (5 << 20)))
    assert read(files("a.jsonl.gz", "b.txt.gz")) == [
        "a.jsonl.gz:1: longer than 1 MiB",
        b"short",
        "b.txt.gz: longer than 1 MiB",
    ]


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow", "a.jsonl.gz", "a.jsonl.zst"])
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(0, 255))
def test_damaged_files_give_text_or_one_error(folder: Path, name: str, place: float, flip: int) -> None:
    """A flip that the format has no sum for may change text; it may not do more."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"text": [f"row {number}" for number in range(100)]})
    path = folder / name
    lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()
    if name.endswith("parquet"):
        pq.write_table(table, path, row_group_size=30)
    elif name.endswith("arrow"):
        arrow_file(path, table, name.removesuffix(".arrow"), 30)
    elif name.endswith("gz"):
        write(path, gzip.compress(lines))
    else:
        with pa.CompressedOutputStream(path, "zstd") as stream:
            stream.write(lines)
    content = bytearray(path.read_bytes())
    at = max(1, int(place * len(content)))
    if flip:
        content[at] ^= flip
    path.write_bytes(content if flip else content[:at])
    try:
        found = read(files(name))
    except ConfigError as error:
        found = [str(error)] if name in str(error) else []
    assert found


def test_parquet_without_its_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "a.parquet", "")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs the package pyarrow; pip install 'moe-zoo\[data\]'$"):
        read(files("a.parquet"))


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_cut_package_is_no_end(folder: Path, cut: int) -> None:
    pa = pytest.importorskip("pyarrow")
    with pa.CompressedOutputStream(folder / "a.jsonl.zst", "zstd") as stream:
        stream.write(b"".join(b'{"text": "%d"}\n' % (number**5) for number in range(1000)))
    write(folder / "a.jsonl.zst", (folder / "a.jsonl.zst").read_bytes()[:-cut])
    with pytest.raises(ConfigError, match=r"^data: found 'a\.jsonl\.zst'; cannot be read: "):
        read(files("a.jsonl.zst"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.txt.gz", "a.jsonl.gz", "gone.txt"])
def test_files_that_cannot_be_read(folder: Path, name: str) -> None:
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    write(folder / name, gzip.compress(b"long enough to be cut")[:-10])
    data = files(name)
    sources = find_sources(data)
    if name == "gone.txt":
        (folder / name).unlink()
    with pytest.raises(
        ConfigError, match=rf"^data(\.paths)?: found '{name}'; (cannot be read|not readable as (Parquet|Arrow)): "
    ):
        list(read_documents(data, sources))


def test_standard_library_leaves_out_what_machines_differ_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ["abc.py", "email/message.py", "json/__init__.py", "os.py"]
    for name in (
        *kept,
        "LICENSE.txt",
        "_sysconfigdata__linux.py",
        "site-packages/numpy/core.py",
        "test/test_os.py",
        "unittest/test/case.py",
        "tkinter/__init__.py",
        "idlelib/idle_test/x.py",
        "__pycache__/abc.py",
    ):
        write(folder / name, "x = 1\n")
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda name: str(folder))
    assert names(StdlibData()) == kept


def test_standard_library_without_sources(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents.sysconfig, "get_path", lambda name: str(folder / "python.zip"))
    with pytest.raises(ConfigError, match=r"^data\.type: found 'stdlib'; .*python\.zip; .* data=files data\.paths="):
        find_sources(StdlibData())


def test_nothing_is_read_before_it_is_asked_for(folder: Path) -> None:
    write(folder / "a.jsonl", "\n".join(['{"text": "a"}'] * 3))
    stream = read_documents(files("a.jsonl"), find_sources(files("a.jsonl")))
    assert isinstance(stream, Iterator)
    first = next(stream)
    assert not isinstance(first, Flaw)
    assert first.text == b"a"
