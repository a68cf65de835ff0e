"""Which layers of a model have to be measured so that all others are known.

What a layer does in a step depends on its kind and on its neighbours, whose weights are gathered ahead of time, and the
first layer of a kind makes what later ones share. Layers alike in all of this do alike.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

REACH = 1
"""Neighbours on each side that matter: the weights of one are gathered ahead."""


def signatures(kinds: Sequence[str]) -> list[Hashable]:
    """For each layer, what decides what it does: its neighbourhood, and whether it is the first of its kind."""
    seen: set[str] = set()
    marked = []
    for kind in kinds:
        marked.append(kind if kind in seen else f"first {kind}")
        seen.add(kind)
    padded = [*["start"] * REACH, *marked, *["end"] * REACH]
    return [tuple(padded[index : index + 2 * REACH + 1]) for index in range(len(kinds))]


def chosen(kinds: Sequence[str]) -> list[int]:
    """Indices of layers that, put together, form a model in which every signature of the whole one occurs."""
    names = signatures(kinds)
    kept = list(range(len(kinds)))
    while (cut := _largest_cut(kept, names)) is not None:
        first, last = cut
        kept = kept[: first + 1] + kept[last + 1 :]
    return kept


def _largest_cut(kept: list[int], names: Sequence[Hashable]) -> tuple[int, int] | None:
    """Places first < last of `kept` with equal signatures, between which nothing is that is not elsewhere too."""
    here = [names[index] for index in kept]
    for length in range(len(kept) - 1, 0, -1):
        for first in range(len(kept) - length):
            last = first + length
            if here[first] == here[last]:
                rest = {*here[: first + 1], *here[last + 1 :]}
                if all(name in rest for name in here[first + 1 : last + 1]):
                    return first, last
    return None


def stand_ins(kinds: Sequence[str], kept: Sequence[int]) -> list[int]:
    """For every layer, the place in `kept` of one with its signature."""
    names = signatures(kinds)
    places = {names[index]: place for place, index in enumerate(kept)}
    return [places[name] for name in names]
