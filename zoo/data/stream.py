"""Tokens in a row: many arrays, in memory or on disk, read by position as if they were one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zoo.data.tokenizer import Learned, Tokens


def _sound(start: int, stop: int) -> None:
    """Memory needs no check."""


@dataclass(frozen=True, eq=False)
class Piece:
    """An array of a stream."""

    tokens: Tokens
    """One-dimensional."""
    learned: Learned | None = None
    """As long as `tokens`: 1 where one is learned, 0 where it is only read; None: all are learned."""
    check: Callable[[int, int], None] = _sound
    """Called with a range of tokens before it is read; raises ConfigError when what lies there is damaged."""


class Section(NamedTuple):
    """A source of a stream: a range of it that a window does not leave."""

    name: str
    start: int
    stop: int
    weight: float
    """Share of the windows that are drawn from it, of any scale."""


class Stream:
    """A one-dimensional sequence of tokens. `stream[a:b]` is an array, read-only, and checked when it lies on disk.

    Args:
        pieces: Of one dtype.
        begin: The token that begins documents and is never a target; None: there is none.
        sections: Cover the stream in order; None: it is one.
    """

    ndim = 1

    def __init__(
        self, pieces: Sequence[Piece], begin: int | None = None, sections: Sequence[Section] | None = None
    ) -> None:
        self._pieces = [piece for piece in pieces if len(piece.tokens)]
        self._starts = [0, *accumulate(len(piece.tokens) for piece in self._pieces)]
        self.begin = begin
        self.dtype: np.dtype[Any] = pieces[0].tokens.dtype if pieces else np.dtype(np.uint8)
        self.sections = tuple(sections or [Section("", 0, len(self), 1.0)])

    @classmethod
    def of(cls, tokens: Stream | Tokens) -> Stream:
        """An array as a stream."""
        if isinstance(tokens, Stream):
            return tokens
        if tokens.ndim != 1:
            raise ValueError(f"tokens of shape {tokens.shape}; a stream has one dimension")
        return cls([Piece(tokens)])

    @classmethod
    def joined(cls, parts: dict[str, tuple[Stream, float]], begin: int | None) -> Stream:
        """Streams one after the other, each a section with its weight."""
        pieces, sections, start = [], [], 0
        for name, (stream, weight) in parts.items():
            pieces += stream._pieces
            sections.append(Section(name, start, start + len(stream), weight))
            start += len(stream)
        return cls(pieces, begin, sections)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, places: slice) -> Tokens:
        start, stop, step = places.indices(len(self))
        if step != 1:
            raise ValueError(f"step {step}; a stream is read forward, token by token")
        parts = [piece.tokens[a:b] for piece, a, b in self._ranges(start, stop)]
        found = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])
        found.flags.writeable = False
        return found

    def rows(self, starts: npt.NDArray[np.int64], length: int) -> tuple[Tokens, Learned | None]:
        """The windows that begin at `starts`: tokens [len(starts), length], and which of them are learned."""
        tokens = np.empty((len(starts), length), self.dtype)
        learned: Learned | None = None
        for row, start in enumerate(starts.tolist()):
            at = 0
            for piece, a, b in self._ranges(start, start + length):
                tokens[row, at : at + b - a] = piece.tokens[a:b]
                if piece.learned is not None:
                    learned = np.ones((len(starts), length), np.uint8) if learned is None else learned
                    learned[row, at : at + b - a] = piece.learned[a:b]
                at += b - a
        return tokens, learned

    def _ranges(self, start: int, stop: int) -> list[tuple[Piece, int, int]]:
        """The pieces that hold a range, each with the range inside it, checked."""
        found = []
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            piece, first = self._pieces[index], self._starts[index]
            end = min(stop, self._starts[index + 1])
            piece.check(start - first, end - first)
            found.append((piece, start - first, end - first))
            start, index = end, index + 1
        return found
