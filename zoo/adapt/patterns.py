"""Parameters chosen by patterns of their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from zoo.spec.base import ConfigError, near


def matching(patterns: Iterable[str], names: Sequence[str], key: str, what: str) -> set[str]:
    """The names that any of the patterns matches.

    Args:
        key: the setting that the patterns stand in.
        what: what the names are names of, for the error.

    Raises:
        ConfigError: a pattern matches none of them.
    """
    found: set[str] = set()
    for pattern in patterns:
        mine = {name for name in names if fnmatchcase(name, pattern)}
        if not mine:
            hint = near(pattern, names) or f"there are: {', '.join(_kinds(names)) or 'none'}"
            raise ConfigError(f"{key}: found {pattern!r}; matches {what} of this model in no place; {hint}")
        found |= mine
    return found


def _kinds(names: Sequence[str], most: int = 16) -> list[str]:
    """Names with layers left open, each once: `layers.*.mixer.q.weight`."""
    kinds = dict.fromkeys(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)
    return [*list(kinds)[:most], *(["..."] if len(kinds) > most else [])]
