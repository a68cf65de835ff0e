"""Batches: a pure function of the step, every window once, ranks that add up."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data.batches import Batches, heldout_rows, heldout_windows, permute
from zoo.spec.base import ConfigError


def counting(length: int) -> np.ndarray:
    """Tokens that tell their own position."""
    return np.arange(length, dtype=np.uint32)


def make(length: int = 1000, **changes: Any) -> Batches:
    chosen: dict[str, Any] = {"batch_size": 4, "seq_len": 8, "seed": 0} | changes
    return Batches(counting(length), **chosen)


def starts_of_epoch(batches: Batches, epoch: int) -> list[int]:
    """First token of every window of an epoch; needs a batch of one row."""
    first = epoch * batches.windows_per_epoch
    return [int(batches.batch(step)[0][0, 0]) for step in range(first, first + batches.windows_per_epoch)]


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutations_are_one_to_one(size: int, key: int) -> None:
    index = np.arange(size, dtype=np.uint64)
    found = permute(index, size, np.full_like(index, key))
    assert sorted(found.tolist()) == list(range(size))


def test_permutations_are_random() -> None:
    size, keys = 10, 20_000
    index = np.zeros(keys, dtype=np.uint64)
    found = np.bincount(permute(index, size, np.arange(keys, dtype=np.uint64)).astype(np.int64), minlength=size)
    assert found.sum() == keys
    assert abs(found / keys - 1 / size).max() < 0.01  # 5 standard deviations
    order = permute(np.arange(10_000, dtype=np.uint64), 10_000, np.zeros(10_000, dtype=np.uint64)).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


def test_permutations_never_change() -> None:
    index = np.arange(10, dtype=np.uint64)
    assert permute(index, 10, np.full_like(index, 7)).tolist() == [5, 7, 3, 2, 8, 1, 4, 6, 9, 0]
    assert make(seed=3).batch(5)[0][:, 0].tolist() == [587, 715, 883, 307]


def test_shapes_types_and_targets() -> None:
    inputs, targets = make().batch(3)
    assert inputs.shape == targets.shape == (4, 8)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    torch.testing.assert_close(targets, inputs + 1)
    torch.testing.assert_close(inputs, inputs[:, :1] + torch.arange(8))


@settings(deadline=None)
@given(length=st.integers(9, 400), seq_len=st.integers(1, 8), seed=st.integers(0, 2**70), epoch=st.integers(0, 50))
def test_an_epoch_visits_windows_once(length: int, seq_len: int, seed: int, epoch: int) -> None:
    batches = make(length, seq_len=seq_len, seed=seed, batch_size=1)
    starts = sorted(starts_of_epoch(batches, epoch))
    assert {later - earlier for earlier, later in pairwise(starts)} <= {seq_len}
    assert starts[0] >= 0
    assert starts[-1] + seq_len + 1 <= length
    assert length - len(starts) * seq_len <= 2 * seq_len


def test_epochs_differ_in_order_and_in_borders() -> None:
    batches = make(10_000, seq_len=50, batch_size=1)
    epochs = [starts_of_epoch(batches, epoch) for epoch in range(20)]
    assert len({starts[0] % 50 for starts in epochs}) > 10
    assert len({tuple(np.argsort(starts)) for starts in epochs}) == 20


@settings(deadline=None)
@given(
    step=st.integers(0, 10_000),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 5),
    length=st.integers(9, 300),
)
def test_ranks_share_out_one_large_batch(step: int, batch_size: int, world_size: int, length: int) -> None:
    whole = make(length, batch_size=batch_size * world_size).batch(step)
    parts = [make(length, batch_size=batch_size, rank=r, world_size=world_size).batch(step) for r in range(world_size)]
    for side in (0, 1):
        torch.testing.assert_close(torch.cat([part[side] for part in parts]), whole[side], rtol=0, atol=0)


def test_a_batch_depends_on_nothing_but_its_step() -> None:
    batches = make()
    later = batches.batch(900)[0]
    batches.batch(2)
    assert torch.equal(batches.batch(900)[0], later)
    assert torch.equal(make().batch(900)[0], later)
    assert not torch.equal(make(seed=1).batch(900)[0], later)
    assert not torch.equal(batches.batch(901)[0], later)


def test_windows_move_through_a_text_of_one_window() -> None:
    batches = make(9, batch_size=3)
    assert batches.windows_per_epoch == 1
    assert batches.batch(0)[0].tolist() == [list(range(8))] * 3


def test_too_little_text() -> None:
    with pytest.raises(
        ConfigError, match=r"^train\.seq_len: found 8; the training text has only 8 tokens and a row takes 9"
    ):
        make(8)
    with pytest.raises(ConfigError, match=r"^train\.seq_len: found 8; the held-out text has only 8 tokens"):
        heldout_windows(counting(8), 8, 100)


@pytest.mark.parametrize("changes", [{"rank": 1}, {"rank": -1}, {"batch_size": 0}, {"seq_len": 0}])
def test_impossible_arguments(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        make(**changes)
    with pytest.raises(ValueError, match="step -1 is negative"):
        make().batch(-1)


def test_held_out_windows_cover_the_text() -> None:
    inputs, targets = heldout_windows(counting(101), 10, 10_000)
    assert inputs.flatten().tolist() == list(range(100))
    assert targets.flatten().tolist() == list(range(1, 101))


def test_held_out_windows_are_spread() -> None:
    assert heldout_rows(counting(101), 10, 49)[:, 0].tolist() == [0, 20, 50, 70]
    assert heldout_rows(counting(101), 10, 3)[:, 0].tolist() == [0]
    rows = heldout_rows(counting(101).astype(np.uint8), 10, 49)
    assert (rows.shape, rows.dtype) == ((4, 11), np.uint8)


@settings(deadline=None)
@given(length=st.integers(2, 500), seq_len=st.integers(1, 20), max_tokens=st.integers(0, 600))
def test_held_out_windows_do_not_overlap(length: int, seq_len: int, max_tokens: int) -> None:
    length = max(length, seq_len + 1)
    inputs, targets = heldout_windows(counting(length), seq_len, max_tokens)
    starts = inputs[:, 0]
    assert (starts.diff() >= seq_len).all()
    assert int(targets.max()) < length
    assert inputs.numel() <= max(max_tokens, seq_len)
    torch.testing.assert_close(targets, inputs + 1)
