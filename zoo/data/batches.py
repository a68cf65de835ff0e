"""Batches as a pure function of (seed, step, row), so that a resumed run needs no state of its data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from zoo.blocks.linear_loss import IGNORED
from zoo.data.stream import Section, Stream
from zoo.data.tokenizer import Tokens
from zoo.spec.base import ConfigError

_U64 = npt.NDArray[np.uint64]
_I64 = npt.NDArray[np.int64]
_ROUNDS = 6
_ROUND = 4096
"""Rows in which a mixture has its proportions."""
_BLOCK = 512
"""Rows whose places are worked out at once."""
_MIXING = 0x6D69787475726573
"""Sets the order of a mixture's sections apart from the order of a section's windows."""


class Batches:
    """Endless shuffled passes over windows that do not overlap.

    Each epoch visits every window once, in an order of its own; the borders of the windows move by a random offset, so
    up to one window's length of tokens at the ends is left out and differs from epoch to epoch. Ranks take neighbouring
    rows: the batches of all ranks, one below the other, are the batch of one rank with `batch_size * world_size`.

    A stream of several sections is a mixture: of every 4,096 rows each section has its share, at least one, in an order
    that is shuffled anew, and has epochs of its own.

    Args:
        tokens: A stream, or a one-dimensional array of any integer type.
        batch_size: Rows that one rank gets.
        seq_len: Tokens of a row.
        first_sizes: Rows that one rank gets of the first batches, where these are smaller.

    Raises:
        ConfigError: fewer than `seq_len + 1` tokens.
    """

    def __init__(
        self,
        tokens: Stream | Tokens,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        first_sizes: Sequence[int] = (),
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}")
        self._tokens = Stream.of(tokens)
        self._batch_size = batch_size
        self._first_sizes = tuple(first_sizes)
        self._first_ends = list(accumulate(first_sizes, initial=0))
        self._seq_len = seq_len
        self._rank = rank
        self._world_size = world_size
        sections = self._tokens.sections
        self._windows = _Windows(sections, seq_len, seed)
        self._mixture = _Mixture([section.weight for section in sections], seed) if len(sections) > 1 else None
        self.windows_per_epoch = int(self._windows.per_epoch.sum())
        """Rows, over all ranks, that there are: after so many a new pass begins, unless sections are mixed."""
        self._blocks: dict[int, _I64] = {}

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of this rank, int64 [rows, seq_len]; the target of a token is the next one.

        There are `batch_size` rows, or what `first_sizes` says of an early step.
        Targets that are not to be learned are IGNORED: what the text marks so, and the tokenizer's `begin`.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        early = step < len(self._first_sizes)
        size = self._first_sizes[step] if early else self._batch_size
        before = self._first_ends[min(step, len(self._first_sizes))]
        before += 0 if early else (step - len(self._first_sizes)) * self._batch_size
        first = before * self._world_size + self._rank * size
        return _inputs_and_targets(self._tokens, self._starts(first, size), self._seq_len)

    def _starts(self, first: int, size: int) -> _I64:
        """The first tokens of the rows of a batch. They are worked out in blocks: numpy is slow on a few numbers."""
        end = first + size
        numbers = range(first // _BLOCK, (end - 1) // _BLOCK + 1)
        self._blocks = {n: self._blocks[n] if n in self._blocks else self._block(n) for n in numbers}
        starts = np.concatenate(list(self._blocks.values()))
        at = first - numbers[0] * _BLOCK
        return starts[at : at + size]

    def _block(self, number: int) -> _I64:
        rows = np.arange(_BLOCK * number, _BLOCK * (number + 1), dtype=np.uint64)
        if self._mixture is None:
            return self._windows.starts(np.zeros(_BLOCK, np.int64), rows)
        return self._windows.starts(*self._mixture.choose(rows))


class _Windows:
    """Where the rows of each section begin."""

    def __init__(self, sections: Sequence[Section], seq_len: int, seed: int) -> None:
        for section in sections:
            whose = f" of data.sources.{section.name}" if section.name else ""
            _check_length(section.stop - section.start, seq_len, f"training text{whose}")
        lengths = np.array([section.stop - section.start for section in sections], np.uint64)
        size, one = np.uint64(seq_len), np.uint64(1)
        self.per_epoch: _U64 = np.maximum(one, (lengths - size) // size)
        self._num_offsets = np.minimum(size, lengths - self.per_epoch * size)
        self._firsts = np.array([section.start for section in sections], np.uint64)
        self._seeds = np.array([_seed_of(seed, section.name) for section in sections], np.uint64)
        self._seq_len = size

    def starts(self, sections: _I64, numbers: _U64) -> _I64:
        """The first token of rows, by their sections and their numbers from 0 among the rows of these."""
        per_epoch = self.per_epoch[sections]
        epoch, index = np.divmod(numbers, per_epoch)
        keys = _mix(_mix(self._seeds[sections]) + epoch)
        offset = _mix(keys) % self._num_offsets[sections]
        starts = permute(index, per_epoch, keys) * self._seq_len + offset + self._firsts[sections]
        return starts.astype(np.int64)


class _Mixture:
    """Which section each row comes from, and how many rows it had before: a function of the row alone.

    Rows are dealt out in rounds of `_ROUND`, in which each section has a fixed number, so no sum over earlier rounds is
    needed; the order inside a round is a permutation of the seed and the round.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._quotas = _quotas(weights)
        self._sections = np.repeat(np.arange(len(weights)), self._quotas)
        self._seed = seed % 2**64
        self._rounds: dict[int, tuple[_I64, _I64]] = {}

    def choose(self, rows: _U64) -> tuple[_I64, _U64]:
        """For each row its section, and its number among the rows of that section."""
        chosen, numbers = np.empty(len(rows), np.int64), np.empty(len(rows), np.uint64)
        rounds, places = np.divmod(rows, np.uint64(_ROUND))
        for number in np.unique(rounds).tolist():
            mine = rounds == number
            section, before = self._round(number)
            chosen[mine] = section[places[mine].astype(np.int64)]
            earlier = self._quotas[chosen[mine]] * number
            numbers[mine] = (earlier + before[places[mine].astype(np.int64)]).astype(np.uint64)
        return chosen, numbers

    def _round(self, number: int) -> tuple[_I64, _I64]:
        """For each row of a round its section, and how many rows of the round that section had before it."""
        if number not in self._rounds:
            places = np.arange(_ROUND, dtype=np.uint64)
            key = _mix(_mix(np.array([self._seed ^ _MIXING], np.uint64)) + np.uint64(number))
            section = self._sections[permute(places, _ROUND, np.repeat(key, _ROUND)).astype(np.int64)]
            before = np.empty(_ROUND, np.int64)
            for index, quota in enumerate(self._quotas.tolist()):
                before[section == index] = np.arange(quota)
            self._rounds = {number: (section, before)}  # the next rows are of the same round, or of the next
        return self._rounds[number]


def _quotas(weights: Sequence[float]) -> _I64:
    """Rows of a round for each section: the largest remainders are rounded up, and none is left without a row."""
    shares = np.array(weights) / math.fsum(weights) * _ROUND
    quotas: _I64 = np.maximum(1, np.floor(shares).astype(np.int64))
    missing = _ROUND - int(quotas.sum())
    if missing > 0:
        quotas[np.argsort(quotas - shares, kind="stable")[:missing]] += 1
    for _ in range(-missing):  # rows that small sections got for the asking come from the largest
        quotas[quotas.argmax()] -= 1
    return quotas


def _seed_of(seed: int, name: str) -> int:
    """A seed for a section, which keeps its order when other sections come and go."""
    salt = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") if name else 0
    return seed % 2**64 ^ salt


def heldout_rows(tokens: Stream | Tokens, seq_len: int, max_tokens: int) -> Tokens:
    """Fixed windows for evaluation, spread evenly over `tokens`: [rows, seq_len + 1], of the type of `tokens`.

    The last token of a window is only a target, and is the first of the next one: with `max_tokens` large enough, every
    token but the very first, and a remainder shorter than a window, is a target once. There are
    `max_tokens // seq_len` rows, at least one.

    Raises:
        ConfigError: fewer than `seq_len + 1` tokens.
    """
    stream = Stream.of(tokens)
    return stream.rows(_spread(len(stream), seq_len, max_tokens), seq_len + 1)[0]


def heldout_windows(tokens: Stream | Tokens, seq_len: int, max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of `heldout_rows`, int64 [rows, seq_len] each; as in `Batches.batch`, some are IGNORED."""
    stream = Stream.of(tokens)
    return _inputs_and_targets(stream, _spread(len(stream), seq_len, max_tokens), seq_len)


def _spread(length: int, seq_len: int, max_tokens: int) -> _I64:
    _check_length(length, seq_len, "held-out text")
    available = (length - 1) // seq_len
    count = min(available, max(1, max_tokens // seq_len))
    starts: _I64 = np.arange(count) * available // count * seq_len
    return starts


def permute(index: _U64, size: int | _U64, keys: _U64) -> _U64:
    """A pseudo-random permutation of range(size), one for each key, evaluated at `index` without being stored.

    A Feistel network on the next even number of bits, walked until the value is below `size` (Black and Rogaway 2002).
    Integer arithmetic alone: the same on every machine and with every version of numpy.

    Args:
        index: Numbers below `size`, one-dimensional.
        size: One for all, or one for each of them; below 2 ** 52.
        keys: The permutation's key for each of them.
    """
    sizes = np.broadcast_to(np.asarray(size, np.uint64), index.shape)
    # frexp counts bits: 2 ** (bits - 1) <= value < 2 ** bits
    bits = np.maximum(2, np.frexp((sizes - np.uint64(1)).astype(np.float64))[1])
    halves = ((bits + 1) // 2).astype(np.uint64)
    masks = (np.uint64(1) << halves) - np.uint64(1)
    rounds = _mix(keys + np.arange(_ROUNDS, dtype=np.uint64)[:, None])
    out = index.copy()
    walking = np.arange(len(out))
    while len(walking):
        half, mask = halves[walking], masks[walking]
        left, right = out[walking] >> half, out[walking] & mask
        for key in rounds[:, walking]:
            left, right = right, left ^ (_mix(right + key) & mask)
        out[walking] = left << half | right
        walking = walking[out[walking] >= sizes[walking]]
    return out


def _mix(value: _U64) -> _U64:
    """The output function of SplitMix64 (Steele et al. 2014), on arrays, where overflow wraps silently."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)


def _inputs_and_targets(stream: Stream, starts: _I64, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, learned = stream.rows(starts, seq_len + 1)
    targets = rows[:, 1:].astype(np.int64)
    if learned is not None:
        targets[learned[:, 1:] == 0] = IGNORED
    if stream.begin is not None:
        targets[targets == stream.begin] = IGNORED
    return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(targets)


def _check_length(length: int, seq_len: int, name: str) -> None:
    if seq_len < 1:
        raise ValueError(f"seq_len {seq_len}")
    if length <= seq_len:
        raise ConfigError(
            f"train.seq_len: found {seq_len}; the {name} has only {length} tokens and a row takes "
            f"{seq_len + 1}; give more text, a larger data.heldout_fraction or a shorter train.seq_len"
        )
