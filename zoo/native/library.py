"""Compiling the kernels, once for each processor and compiler, and loading them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

from zoo.hardware.speed import cache_dir

SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in ("kernels.cpp", "experts.cpp", "ssd.cpp", "delta.cpp", "pointwise.cpp", "wide.cpp", "trunk.cpp")
)
HEADERS = (Path(__file__).with_name("tiles.h"),)
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_PATIENCE_S = 600


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had, and then the reason was written to the standard error.

    They are kept as `native-*.so` in `cache_dir()`. Compiling takes about 20 s and is announced in one line.
    """
    try:
        compiler = _compiler()
        path = cache_dir() / f"native-{_key(compiler)}.so"
        if not path.exists():
            _compile(compiler, path)
        # After torch, so that both share one runtime of OpenMP and its threads.
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        _say(f"no compiled kernels, experts and decoding are slower: {_reason(error)}")
        return None
    loaded.zoo_run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    loaded.zoo_run.restype = None
    return loaded


def is_loaded() -> bool:
    """Whether the kernels are at hand without compiling or loading anything now."""
    return library.cache_info().currsize > 0 and library() is not None


def _compiler() -> str:
    """The path of a C++ compiler: `$CXX`, or the first of `COMPILERS` that is found."""
    for name in (os.environ.get("CXX"), *COMPILERS):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise OSError(f"there is no C++ compiler ({', '.join(COMPILERS)}, or the one that CXX names)")


def processor() -> str:
    """What this machine's processor can do, for keys of what depends on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    about = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join((platform.platform(), *sorted(about)))


def _key(compiler: str) -> str:
    """What the result depends on. A home directory may be shared by machines with different processors."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_PATIENCE_S, check=True).stdout
    about = "\n".join((repr(FLAGS), processor(), torch.__version__)).encode()
    parts = (*(source.read_bytes() for source in (*SOURCES, *HEADERS)), version, about)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    """Put the library at `path`, at once, so that no other process loads half of it."""
    start = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder, path.name)
        command = [compiler, *FLAGS, native, *map(str, SOURCES), "-o", str(draft)]
        try:
            _run([*command, "-fopenmp"])
        except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread is better than none
            _run(command)
        os.replace(draft, path)
    _say(f"compiled the kernels of experts and decoding in {time.perf_counter() - start:.1f} s; kept as {path}")


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=True)


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError) and error.stderr:
        return f"{Path(error.cmd[0]).name} failed: {str(error.stderr).strip().splitlines()[0]}"
    return str(error)


def _say(message: str) -> None:
    print(f"zoo: {message}", file=sys.stderr)
