"""The layer-pattern language: `"3*dense 58*sparse"`, `"8*(5*local global)"`.

Grammar: a pattern is one or more items parted by spaces; an item is a kind's name or a pattern in brackets, either with
an optional repeat `N*` before it.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(r"\s*(?:(?P<count>\d+)\s*\*|(?P<name>[A-Za-z_]\w*)|(?P<bracket>[()]))")
MAX_LAYERS = 100_000


class PatternError(ValueError):
    """A pattern that cannot be read; the message marks the place."""


def expand(pattern: str) -> tuple[str, ...]:
    """The kinds of all layers in order.

    Raises:
        PatternError: for an unreadable pattern, with the column of the mistake.
    """
    layers, end = _sequence(pattern, 0, depth=0)
    if end != len(pattern):
        raise _mistake(pattern, end, "a ')' without its '('")
    return layers


def compress(layers: tuple[str, ...]) -> str:
    """A short pattern that expands to `layers`: the shortest repeating unit at each place, greedily."""
    items: list[str] = []
    start = 0
    while start < len(layers):
        length, count = _best_repeat(layers[start:])
        unit = layers[start : start + length]
        if count == 1:
            items.append(unit[0])
        else:
            body = unit[0] if length == 1 else f"({compress(unit)})"
            items.append(f"{count}*{body}")
        start += length * count
    return " ".join(items)


def _best_repeat(layers: tuple[str, ...]) -> tuple[int, int]:
    """Length and count of the leading unit whose repetition covers the most layers (shorter units win ties)."""
    best = (1, 1)
    for length in range(1, len(layers) // 2 + 1):
        count = 1
        while layers[count * length : (count + 1) * length] == layers[:length]:
            count += 1
        if count > 1 and length * count > best[0] * best[1]:
            best = (length, count)
    return best


def _sequence(pattern: str, start: int, depth: int) -> tuple[tuple[str, ...], int]:
    layers: list[str] = []
    at = start
    while pattern[at:].strip():
        token = _TOKEN.match(pattern, at)
        if token is None:
            raise _mistake(pattern, at, "expected a kind's name, a repeat like 3*, or '('")
        if token["bracket"] == ")":
            if depth and layers:
                return tuple(layers), token.end()
            break
        count, at = (int(token["count"]), token.end()) if token["count"] else (1, at)
        item, at = _item(pattern, at, depth)
        if count < 1 or len(layers) + count * len(item) > MAX_LAYERS:
            raise _mistake(pattern, token.start(), f"a repeat must give 1 to {MAX_LAYERS} layers")
        layers += item * count
    if depth:
        raise _mistake(pattern, at, "a '(' without its ')', or empty brackets")
    if not layers:
        raise _mistake(pattern, at, "expected at least one layer")
    end = at if pattern[at:].strip() else len(pattern)
    return tuple(layers), end


def _item(pattern: str, at: int, depth: int) -> tuple[tuple[str, ...], int]:
    token = _TOKEN.match(pattern, at)
    if token and token["name"]:
        return (token["name"],), token.end()
    if token and token["bracket"] == "(" and depth < 20:
        return _sequence(pattern, token.end(), depth + 1)
    raise _mistake(pattern, at, "expected a kind's name or '(' after the repeat")


def _mistake(pattern: str, at: int, reason: str) -> PatternError:
    at = len(pattern) - len(pattern[at:].lstrip())
    return PatternError(f"{reason}, at column {at + 1}: {pattern[:at]!r} >>> {pattern[at : at + 20]!r}")
