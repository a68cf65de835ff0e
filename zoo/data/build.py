"""Text becomes shards: read, split, tokenized, cut where an interrupted and an undisturbed run cut alike."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np

from zoo.data.documents import START, Document, Flaw, Position, Side, Source, read_documents
from zoo.data.formats import Markup, Part
from zoo.data.progress import Progress
from zoo.data.shards import SIDES, Extent, Facts, Shard, check_all, open_shard, write_shard
from zoo.data.stream import Piece
from zoo.data.tokenizer import Encoded, Tokenizer
from zoo.spec.base import ConfigError
from zoo.spec.data import RecordsSpec, SplitSpec

_FLAWS_SHOWN = 5
_SHARD_BYTES = 1 << 26
"""Text of a shard: what a killed run loses at most."""
_BATCH_BYTES = 1 << 22
"""Text that is tokenized in one call."""
_CALLS_AHEAD = 2
"""Calls of the tokenizer that may wait for their turn while text is read."""


@dataclass
class Builder:
    """Makes the shards of one source of text, in order.

    Raises:
        ConfigError: see `zoo.data.corpus.load_corpus`.
    """

    data: SplitSpec
    sources: list[Source]
    tokenizer: Tokenizer
    key: str
    place: Path | None = None
    """Where shards are kept, and found again; None: in memory."""
    cut: bool = False
    """Hold out the end of every document, instead of whole documents."""
    flaws: list[tuple[str, str]] = field(default_factory=list)
    """Where there was no usable text, and why, so far."""

    def shards(self) -> Iterator[Shard]:
        """Every shard: those on disk that are sound, and anew what is missing between them and after them."""
        position, number, last = START, 0, False
        reading: _Reading | None = None
        sizes = [source.path.stat().st_size if source.path.is_file() else 0 for source in self.sources]
        before = [0, *accumulate(sizes)]
        with Progress("tokenizing", before[-1]) as progress, ThreadPoolExecutor(1) as pool:
            while not last:
                path = self.place / shard_name(number) if self.place else None
                shard = self._stored(path, position)
                if shard:
                    reading = None
                else:
                    reading = reading or _Reading(self, pool, progress, before, position)
                    shard = reading.next_shard()
                self.judge(shard.facts.flaws)
                if path and reading:
                    shard = _kept(path, shard)
                yield shard
                position, number, last = shard.facts.next, number + 1, shard.facts.last

    def _stored(self, path: Path | None, position: Position) -> Shard | None:
        if path is None or not path.is_file():
            return None
        try:
            shard = open_shard(path)
            check_all(shard)
        except ConfigError:
            return None
        facts = shard.facts
        return shard if (facts.key, facts.start, facts.cut) == (self.key, position, self.cut) else None

    def judge(self, flaws: tuple[tuple[str, str], ...]) -> None:
        """Count what could not be used, and raise unless that is tolerated. The standard library is always skipped."""
        self.flaws += flaws
        if not isinstance(self.data, RecordsSpec) or not self.flaws:
            return
        most = self.data.max_bad
        if self.data.on_bad == "stop":
            advice = "correct or leave out the files, or skip such texts with data.on_bad=skip"
            self._refuse(f"found {count(len(self.flaws), 'text')} that cannot be used", advice)
        if len(self.flaws) > most:
            advice = "look at the files, or raise data.max_bad"
            self._refuse(f"found more than {count(most, 'text')} that cannot be used (data.max_bad)", advice)

    def _refuse(self, what: str, advice: str) -> None:
        listed = "".join(f"\n  {where}: {reason}" for where, reason in self.flaws[:_FLAWS_SHOWN])
        more = f"\n  and {len(self.flaws) - _FLAWS_SHOWN} more" if len(self.flaws) > _FLAWS_SHOWN else ""
        raise ConfigError(f"data: {what}; reading stopped there; {advice}{listed}{more}")

    def too_many(self, num_new: int) -> bool:
        """Whether reading on is of no use."""
        if not isinstance(self.data, RecordsSpec):
            return False
        stop = self.data.on_bad == "stop"
        return num_new >= _FLAWS_SHOWN if stop else len(self.flaws) + num_new > self.data.max_bad


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"{number:06d}.safetensors"


def count(number: int, noun: str) -> str:
    """`1 text`, `2 texts`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _kept(path: Path, shard: Shard) -> Shard:
    """Write a shard and map it, so that memory holds one at a time."""
    try:
        write_shard(path, shard)
    except OSError as error:
        advice = "make room, or keep tokens elsewhere: XDG_CACHE_HOME=DIRECTORY"
        raise ConfigError(f"data: the tokens cannot be written to {path}: {error}; {advice}") from error
    return open_shard(path)


class _Reading:
    """Documents from a position on, shard by shard."""

    def __init__(
        self, builder: Builder, pool: ThreadPoolExecutor, progress: Progress, before: list[int], start: Position
    ) -> None:
        self._builder, self._pool, self._progress = builder, pool, progress
        self._before = before  # bytes of all earlier sources
        self._documents = read_documents(builder.data, builder.sources, start)
        self._start = start

    def next_shard(self) -> Shard:
        """Read on to the end of the shard: after a document, when there is text enough."""
        filling = _Filling(self._builder.tokenizer, self._pool)
        flaws: list[tuple[str, str]] = []
        start, end, last = self._start, self._start, True
        for document in self._documents:
            end = document.next
            if isinstance(document, Flaw):
                flaws.append((document.where, document.reason))
                if self._builder.too_many(len(flaws)):
                    break
                continue
            sent = [filling.add(side, parts) for side, parts in self._sides(document)]
            if any(sent):
                self._progress.update(self._before[document.source] + document.end)
            if filling.num_bytes >= _SHARD_BYTES:
                last = False
                break
        self._start = end
        pieces = filling.pieces()
        builder = self._builder
        facts = Facts(builder.key, start, end, last, builder.cut, filling.extents(pieces), tuple(flaws))
        return Shard(facts, pieces)

    def _sides(self, document: Document) -> list[tuple[Side, tuple[Part, ...]]]:
        data, whole = self._builder.data, self._builder.sources[document.source].side
        if whole:
            return [(whole, document.parts)]
        if self._builder.cut:
            if isinstance(document.parts[0][0], Markup):
                advice = "give more of them, another data.seed, or data.heldout_paths"
                raise ConfigError(f"data: found too few conversations to hold some of them out; {advice}")
            *before, (text, learned) = document.parts
            at = cut_place(bytes(text), data.heldout_fraction)
            ends: list[tuple[Side, memoryview]] = [("train", memoryview(text)[:at]), ("heldout", memoryview(text)[at:])]
            return [(side, (*before, (part, learned))) for side, part in ends if part]
        return [("heldout" if is_held_out(document.key, data) else "train", document.parts)]


def has_both_sides(data: SplitSpec, sources: list[Source]) -> bool:
    """Whether documents as wholes, or sources as wholes, give both sides some text; read until that is known."""
    if any(source.side for source in sources):
        return True
    seen = set()
    for document in read_documents(data, sources):
        if isinstance(document, Document):
            seen.add(is_held_out(document.key, data))
            if len(seen) == 2:
                return True
    return False


def is_held_out(key: bytes, data: SplitSpec) -> bool:
    """Whether a hash of a document falls below the fraction."""
    digest = hashlib.blake2b(key, digest_size=8, key=str(data.seed).encode()).digest()
    return int.from_bytes(digest, "little") < data.heldout_fraction * 2.0**64


def cut_place(text: bytes, heldout_fraction: float) -> int:
    """Where the held-out end of a text begins: at a character."""
    at = int(len(text) * (1 - heldout_fraction))
    while at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1
    return at


class _Filling:
    """A shard while it grows. Text is tokenized in a thread while more of it is read."""

    def __init__(self, tokenizer: Tokenizer, pool: ThreadPoolExecutor) -> None:
        self.num_bytes = 0
        self._tokenizer, self._pool = tokenizer, pool
        self._batch: list[tuple[Side, tuple[Part, ...]]] = []
        self._batch_bytes = 0
        self._calls: deque[tuple[list[Side], Future[Encoded]]] = deque()
        self._documents: Counter[Side] = Counter()
        self._bytes: Counter[Side] = Counter()
        self._found: dict[Side, list[Piece]] = {side: [] for side in SIDES}

    def add(self, side: Side, parts: tuple[Part, ...]) -> bool:
        """Whether this was enough for a call of the tokenizer."""
        for text, learned in parts:
            self.num_bytes += len(text)
            self._batch_bytes += len(text)
            self._bytes[side] += len(text) * learned
        self._documents[side] += 1
        self._bytes[side] += parts[-1][1]  # the separator, where it is learned
        self._batch.append((side, parts))
        if self._batch_bytes < _BATCH_BYTES:
            return False
        self._send()
        return True

    def pieces(self) -> dict[Side, Piece]:
        """Everything that was added."""
        self._send()
        while self._calls:
            self._receive()
        return {side: self._piece(side) for side in SIDES}

    def extents(self, pieces: dict[Side, Piece]) -> dict[Side, Extent]:
        """How much that is."""
        return {side: self._extent(side, piece) for side, piece in pieces.items()}

    def _send(self) -> None:
        sides, documents = [side for side, _ in self._batch], [parts for _, parts in self._batch]
        self._calls.append((sides, self._pool.submit(self._tokenizer.encode_documents, documents)))
        self._batch, self._batch_bytes = [], 0
        while len(self._calls) > _CALLS_AHEAD:
            self._receive()

    def _receive(self) -> None:
        sides, call = self._calls.popleft()
        found = call.result()
        for side in SIDES:
            mine = np.repeat(np.array([other == side for other in sides], np.bool_), found.lengths)
            learned = None if found.learned is None else found.learned[mine]
            self._found[side].append(Piece(found.tokens[mine], learned))

    def _piece(self, side: Side) -> Piece:
        found = self._found.pop(side)
        tokens = np.concatenate([np.empty(0, self._tokenizer.dtype), *(part.tokens for part in found)])
        if all(part.learned is None for part in found):
            return Piece(tokens)
        masks = [np.ones(len(part.tokens), np.uint8) if part.learned is None else part.learned for part in found]
        return Piece(tokens, np.concatenate(masks))

    def _extent(self, side: Side, piece: Piece) -> Extent:
        learned = piece.tokens if piece.learned is None else piece.tokens[piece.learned == 1]
        # A first token of its own is no target.
        begins = 0 if self._tokenizer.begin is None else np.count_nonzero(learned == self._tokenizer.begin)
        return Extent(self._documents[side], self._bytes[side], len(learned) - int(begins))
