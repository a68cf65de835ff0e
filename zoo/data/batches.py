"""Batches as a pure function of (seed, step, rank), so that a resumed run needs no state of its data."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from zoo.data.tokenizer import Tokens
from zoo.spec.base import ConfigError

_U64 = npt.NDArray[np.uint64]
_ROUNDS = 6


class Batches:
    """Endless shuffled passes over windows that do not overlap.

    Each epoch visits every window once, in an order of its own; the borders of the windows move by a random offset, so
    up to one window's length of tokens at the ends is left out and differs from epoch to epoch. Ranks take neighbouring
    rows: the batches of all ranks, one below the other, are the batch of one rank with `batch_size * world_size`.

    Args:
        tokens: One-dimensional, any integer type; may be mapped from disk.
        batch_size: Rows that one rank gets.
        seq_len: Tokens of a row.

    Raises:
        ConfigError: fewer than `seq_len + 1` tokens.
    """

    def __init__(
        self, tokens: Tokens, *, batch_size: int, seq_len: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size}")
        _check_length(tokens, seq_len, "training")
        self._tokens = tokens
        self._batch_size = batch_size
        self._seq_len = seq_len
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self.windows_per_epoch = max(1, (len(tokens) - seq_len) // seq_len)
        """Rows, over all ranks, after which a new pass begins."""
        self._num_offsets = min(seq_len, len(tokens) - self.windows_per_epoch * seq_len)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of this rank, int64 [batch_size, seq_len]; the target of a token is the next one."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        first = (step * self._world_size + self._rank) * self._batch_size
        rows = np.arange(first, first + self._batch_size, dtype=np.uint64)
        epoch, index = np.divmod(rows, np.uint64(self.windows_per_epoch))
        keys = _mix(_mix(np.full_like(rows, self._seed % 2**64)) + epoch)
        offset = _mix(keys) % np.uint64(self._num_offsets)
        starts = permute(index, self.windows_per_epoch, keys) * np.uint64(self._seq_len) + offset
        return _inputs_and_targets(_rows(self._tokens, starts.astype(np.int64), self._seq_len))


def heldout_rows(tokens: Tokens, seq_len: int, max_tokens: int) -> Tokens:
    """Fixed windows for evaluation, spread evenly over `tokens`: [rows, seq_len + 1], of the type of `tokens`.

    The last token of a window is only a target, and is the first of the next one: with `max_tokens` large enough, every
    token but the very first, and a remainder shorter than a window, is a target once. There are
    `max_tokens // seq_len` rows, at least one.

    Raises:
        ConfigError: fewer than `seq_len + 1` tokens.
    """
    _check_length(tokens, seq_len, "held-out")
    available = (len(tokens) - 1) // seq_len
    count = min(available, max(1, max_tokens // seq_len))
    return _rows(tokens, np.arange(count) * available // count * seq_len, seq_len)


def heldout_windows(tokens: Tokens, seq_len: int, max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of `heldout_rows`, int64 [rows, seq_len] each."""
    return _inputs_and_targets(heldout_rows(tokens, seq_len, max_tokens))


def permute(index: _U64, size: int, keys: _U64) -> _U64:
    """A pseudo-random permutation of range(size), one for each key, evaluated at `index` without being stored.

    A Feistel network on the next even number of bits, walked until the value is below `size` (Black and Rogaway 2002).
    Integer arithmetic alone: the same on every machine and with every version of numpy.

    Args:
        index: Numbers below `size`, one-dimensional.
        keys: The permutation's key for each of them.
    """
    half = np.uint64((max(2, (size - 1).bit_length()) + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    out = index.copy()
    walking = np.arange(len(out))
    while len(walking):
        left, right = out[walking] >> half, out[walking] & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(right + _mix(keys[walking] + np.uint64(number))) & mask)
        out[walking] = left << half | right
        walking = walking[out[walking] >= size]
    return out


def _mix(value: _U64) -> _U64:
    """The output function of SplitMix64 (Steele et al. 2014), on arrays, where overflow wraps silently."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)


def _rows(tokens: Tokens, starts: npt.NDArray[np.int64], seq_len: int) -> Tokens:
    rows: Tokens = tokens[starts[:, None] + np.arange(seq_len + 1)]
    return rows


def _inputs_and_targets(rows: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))


def _check_length(tokens: Tokens, seq_len: int, name: str) -> None:
    if seq_len < 1 or tokens.ndim != 1:
        raise ValueError(f"seq_len {seq_len}, tokens of shape {tokens.shape}")
    if len(tokens) <= seq_len:
        raise ConfigError(
            f"train.seq_len: found {seq_len}; the {name} text has only {len(tokens)} tokens and a row takes "
            f"{seq_len + 1}; give more text, a larger data.heldout_fraction or a shorter train.seq_len"
        )
