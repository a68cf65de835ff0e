"""Streams: many arrays read as one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data.stream import Piece, Section, Stream


def stream(lengths: list[int], masked: bool = False) -> tuple[Stream, np.ndarray, np.ndarray]:
    """A stream of pieces of these lengths; all its tokens, and which are learned."""
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    learned = (np.random.default_rng(0).random(len(tokens)) < 0.5).astype(np.uint8)
    bounds = np.cumsum([0, *lengths])
    pieces = []
    for index, (a, b) in enumerate(pairwise(bounds)):
        mask = masked and index % 2 == 0
        pieces.append(Piece(tokens[a:b], learned[a:b] if mask else None))
        if not mask:
            learned[a:b] = 1
    return Stream(pieces), tokens, learned


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=6), st.integers(-3, 40), st.integers(-3, 40), st.booleans())
def test_slices_are_those_of_one_array(lengths: list[int], start: int, stop: int, masked: bool) -> None:
    found, tokens, _ = stream(lengths, masked)
    assert len(found) == len(tokens)
    np.testing.assert_array_equal(found[start:stop], tokens[start:stop])
    np.testing.assert_array_equal(found[:], tokens)
    assert not found[start:stop].flags.writeable


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data(), st.booleans())
def test_rows_are_those_of_one_array(lengths: list[int], data: st.DataObject, masked: bool) -> None:
    found, tokens, learned = stream(lengths, masked)
    length = data.draw(st.integers(0, len(tokens)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(tokens) - length), max_size=4)), dtype=np.int64)
    rows, mask = found.rows(starts, length)
    places = starts[:, None] + np.arange(length)
    np.testing.assert_array_equal(rows, tokens[places])
    np.testing.assert_array_equal(np.ones_like(rows) if mask is None else mask, learned[places])
    assert masked or mask is None


def test_a_range_is_checked_before_it_is_read() -> None:
    asked: list[tuple[str, int, int]] = []
    pieces = [
        Piece(np.zeros(5, np.uint8), None, lambda start, stop, name=name: asked.append((name, start, stop)))  # type: ignore[misc]
        for name in "ab"
    ]
    found = Stream(pieces)
    found[3:7]
    assert asked == [("a", 3, 5), ("b", 0, 2)]
    asked.clear()
    found.rows(np.array([6, 1]), 2)
    assert asked == [("b", 1, 3), ("a", 1, 3)]


def test_joined_streams_keep_their_borders() -> None:
    one, two = stream([3, 2])[0], stream([4])[0]
    found = Stream.joined({"one": (one, 3.0), "two": (two, 1.0)}, None)
    assert found.sections == (Section("one", 0, 5, 3.0), Section("two", 5, 9, 1.0))
    assert found[:].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_what_a_stream_is_not() -> None:
    found, _, _ = stream([3])
    with pytest.raises(ValueError, match="step 2"):
        found[::2]
    with pytest.raises(ValueError, match="one dimension"):
        Stream.of(np.zeros((2, 2), np.uint8))
    assert Stream.of(found) is found
    assert len(Stream([])) == 0
