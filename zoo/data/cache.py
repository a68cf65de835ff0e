"""Tokens kept on disk: a directory for each text and tokenizer, with shards and, once all are there, `corpus.json`."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo.data import hub
from zoo.data.chat import load_template
from zoo.data.documents import Source
from zoo.data.shards import FORMAT
from zoo.data.tokenizer import tokenizer_file
from zoo.spec.base import ConfigError
from zoo.spec.data import ChatData, FileTokenizer, HFData, SplitSpec, TokenizerSpec

FACTS, SKIPPED = "corpus.json", "skipped.txt"
_LOCK = ".lock"
_TOLERANCE = ("on_bad", "max_bad")
"""Settings that say what may be passed over, which shards remember, and change no token."""


def key_of(data: SplitSpec, tokenizer: TokenizerSpec, sources: list[Source]) -> str:
    """What names the tokens of these settings and these files, as told by their sizes and times of change.

    Raises:
        ConfigError: a file is gone, or the Hub does not answer.
    """
    settings = {name: value for name, value in data.to_dict().items() if name not in _TOLERANCE}
    key: list[Any] = [FORMAT, settings, tokenizer.to_dict()]
    if isinstance(data, HFData):
        key += hub.identity(data)
    else:
        try:
            stats = [(source.name, source.path.stat()) for source in sources]
        except OSError as error:
            raise ConfigError(f"data: found '{error.filename}'; cannot be read: {error}") from error
        key += [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    if isinstance(data, ChatData):
        key.append(load_template(data.template).text)
    if isinstance(tokenizer, FileTokenizer):
        key.append(hashlib.sha256(tokenizer_file(tokenizer).read_bytes()).hexdigest())
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Make a directory, and let other processes that want to write in it wait.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = open(place / _LOCK, "ab")  # noqa: SIM115
    except OSError as error:
        advice = "keep tokens elsewhere: XDG_CACHE_HOME=DIRECTORY"
        raise ConfigError(f"data: tokens cannot be kept in {place}: {error}; {advice}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another process that tokenizes the same text", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_facts(place: Path) -> dict[str, Any] | None:
    """What `write_facts` wrote; None when the directory is not complete, or the file cannot be used."""
    try:
        facts = json.loads((place / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def write_facts(place: Path, facts: dict[str, Any], flaws: list[tuple[str, str]]) -> None:
    """Declare a directory complete; what was passed over is listed beside.

    Raises:
        ConfigError: no room for it.
    """
    try:
        if flaws:
            listed = "".join(f"{where}: {reason}\n" for where, reason in flaws)
            (place / SKIPPED).write_text(listed, encoding="utf-8")
        draft = place / f".{FACTS}.{os.getpid()}"
        draft.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        os.replace(draft, place / FACTS)
    except OSError as error:
        raise ConfigError(f"data: {place} cannot be written: {error}") from error
