"""The kernels: how they are compiled, kept and done without; and that both sides mean the same structs."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from zoo.native import calls
from zoo.native import library as native
from zoo.native.memory import use_huge_pages

MIRRORED = (
    calls.NormCall,
    calls.AddCall,
    calls.ProductCall,
    calls.RouteCall,
    calls.FeedCall,
    calls.AttendCall,
    calls.PassInfo,
    calls.Call,
)


def test_structs_are_those_of_the_source() -> None:
    found = native.library()
    if found is None:
        pytest.skip("no C++ compiler here")
    sizes = (ctypes.c_int64 * len(MIRRORED)).in_dll(found, "zoo_sizes")
    assert list(sizes) == [ctypes.sizeof(struct) for struct in MIRRORED]


def test_without_a_compiler_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert native.library.__wrapped__() is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "there is no C++ compiler (c++, g++, clang++" in said


def test_a_compiler_that_fails_is_done_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "cannot go on" >&2; exit 1; }\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert native.library.__wrapped__() is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "broken failed: cannot go on" in said


def test_what_was_compiled_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A stand-in for the compiler, which would take seconds: it makes an empty library."""
    if native.library() is None:
        pytest.skip("no C++ compiler here")
    real = native._compiler()
    compiler = tmp_path / "quick"
    count = tmp_path / "count"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho x >> {count}\nwhile [ "$1" != -o ]; do shift; done\n'
        f"echo 'extern \"C\" void zoo_run() {{}}' | {real} -shared -fPIC -x c++ - -o $2\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        assert native.library.__wrapped__() is not None
    assert count.read_text() == "x\n"
    assert capsys.readouterr().err.count("compiled the kernels") == 1
    assert len(list((tmp_path / "cache/zoo").iterdir())) == 1


def test_huge_pages_leave_numbers_as_they_are() -> None:
    large, small = torch.arange(2**21), torch.arange(3)
    use_huge_pages([large, small])
    assert torch.equal(large, torch.arange(2**21))
    assert torch.equal(small, torch.arange(3))
