"""From what the user names to files, in an order that no listing of a directory shows."""

from __future__ import annotations

import glob
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from zoo.spec.base import ConfigError, near

_NOT_EVERYWHERE = frozenset(
    "site-packages dist-packages __pycache__ lib-dynload "
    "test tests idle_test idlelib lib2to3 distutils ensurepip macholib tkinter turtledemo".split()
)
"""Folders below the standard library that are no part of it, or that some distributions leave out."""
_LOCAL = ("_sysconfigdata", "_distutils_system_mod", "sitecustomize", "usercustomize", "python-config")
"""Files that begin so are written when Python is built or packaged, and differ from machine to machine."""
_NAMES_SHOWN = 8


def matching_files(patterns: Iterable[str], key: str) -> list[Path]:
    """The files that paths and patterns mean, each once, sorted by where they really are.

    Args:
        patterns: Files, directories (read recursively, hidden names left out) and glob patterns; `~` is the home.
        key: The setting that names them, for the error.

    Raises:
        ConfigError: one of the patterns means no file.
    """
    paths = {os.path.realpath(path): path for pattern in patterns for path in _match(pattern, key)}
    return [paths[real] for real in sorted(paths)]


def library_files(root: Path) -> list[Path]:
    """The source files of Python's standard library in `root`, sorted by their names below it.

    Raises:
        ConfigError: this Python has none.
    """
    if not (root / "os.py").is_file():
        raise ConfigError(
            f"data.type: found 'stdlib'; this Python {platform.python_version()} has no source files of its library "
            f"in {root}; use another Python, or texts of your own: data=files data.paths=[texts/]"
        )
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_EVERYWHERE]
        found += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith(_LOCAL)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def what_is_there(path: Path) -> str:
    """The names beside a path that does not exist, those like it first; or those in the last folder that does exist."""
    folder = path.parent
    while not folder.is_dir():
        path, folder = folder, folder.parent
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    if hint := near(path.name, names):
        return hint
    shown = " ".join(names[:_NAMES_SHOWN]) + (f" and {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN))
    return f"{folder if folder != Path() else Path.cwd()} holds {shown or 'nothing'}"


def _match(pattern: str, key: str) -> list[Path]:
    path = Path(pattern).expanduser()
    matches = [path] if path.exists() else [Path(match) for match in glob.glob(str(path), recursive=True)]
    files = [file for match in matches for file in ([match] if not match.is_dir() else _walk(match))]
    if files:
        return files
    if path.is_dir():
        raise ConfigError(f"{key}: found {pattern!r}; holds no files; give files, directories or quoted patterns")
    rule = f"matches no file or directory, seen from {Path.cwd()}"
    raise ConfigError(f"{key}: found {pattern!r}; {rule}; {what_is_there(path)}")


def _walk(root: Path) -> list[Path]:
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        seen.add(real)  # a link may lead back up
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return found
