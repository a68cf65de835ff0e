"""Tokens kept on disk: a directory an entry, with `.npy` arrays that are mapped into memory, and `facts.json`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zoo.data.documents import Source
from zoo.data.tokenizer import tokenizer_file
from zoo.spec.base import ConfigError
from zoo.spec.data import DataSpec, FileTokenizer, TokenizerSpec

_FORMAT = 1
"""Raised when the same files would give other tokens."""
_FACTS = "facts.json"


def entry(root: Path, data: DataSpec, tokenizer: TokenizerSpec, sources: list[Source]) -> Path:
    """The directory below `root` for these settings and these files, as told by their sizes and times of change."""
    try:
        stats = [(source.name, source.path.stat()) for source in sources]
    except OSError as error:
        raise ConfigError(f"data: found '{error.filename}'; cannot be read: {error}") from error
    key: list[Any] = [_FORMAT, data.to_dict(), tokenizer.to_dict()]
    key += [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    if isinstance(tokenizer, FileTokenizer):
        key.append(hashlib.sha256(tokenizer_file(tokenizer).read_bytes()).hexdigest())
    return root / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def read(place: Path) -> dict[str, Any] | None:
    """What `write` put into an entry, arrays mapped read-only; None when there is no entry.

    Raises:
        ConfigError: the entry is damaged.
    """
    if not place.is_dir():
        return None
    try:
        facts: dict[str, Any] = json.loads((place / _FACTS).read_text(encoding="utf-8"))
        arrays = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in place.glob("*.npy")}
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"data: the cached tokens in {place} are damaged ({error}); delete that directory") from error
    return facts | arrays


def write(place: Path, values: Mapping[str, npt.NDArray[Any] | int | str]) -> None:
    """Create an entry at once, so that no reader sees half of it. Several processes may write the same one."""
    facts = {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=place.parent, prefix=".draft-"))
    try:
        for name in values.keys() - facts.keys():
            np.save(draft / f"{name}.npy", values[name], allow_pickle=False)
        (draft / _FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        os.rename(draft, place)
    except OSError:
        if not place.is_dir():  # else another process was first, with the same content
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
