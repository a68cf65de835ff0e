"""Batches: a pure function of the step, every window once, ranks that add up."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data.batches import _ROUND, Batches, _Mixture, heldout_rows, heldout_windows, permute
from zoo.data.stream import Piece, Section, Stream
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


def mixed(lengths: list[int], weights: list[float], **changes: Any) -> Batches:
    """Batches of sections whose tokens tell their own position in the whole."""
    tokens, bounds = counting(sum(lengths)), np.cumsum([0, *lengths]).tolist()
    sections = [
        Section(name, start, stop, weight)
        for name, (start, stop), weight in zip("abcdef", pairwise(bounds), weights, strict=False)
    ]
    chosen: dict[str, Any] = {"batch_size": 4, "seq_len": 8, "seed": 0} | changes
    return Batches(Stream([Piece(tokens)], None, sections), **chosen)


@settings(deadline=None, max_examples=50)
@given(
    weights=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=6),
    seed=st.integers(0, 2**64 - 1),
    number=st.integers(0, 2**30),
)
def test_a_mixture_has_its_shares_in_every_round(weights: list[float], seed: int, number: int) -> None:
    mixture = _Mixture(weights, seed)
    rows = np.arange(_ROUND * number, _ROUND * (number + 1), dtype=np.uint64)
    section, before = mixture.choose(rows)
    counts = np.bincount(section, minlength=len(weights))
    assert counts.min() >= 1
    shares = np.array(weights) / sum(weights) * _ROUND
    assert (abs(counts - shares) <= len(weights) + 1).all()
    for index, count in enumerate(counts.tolist()):
        assert before[section == index].tolist() == list(range(count * number, count * (number + 1)))


@settings(deadline=None, max_examples=50)
@given(step=st.integers(0, 10_000), batch_size=st.integers(1, 5), world_size=st.integers(1, 5))
def test_ranks_share_out_one_large_mixture(step: int, batch_size: int, world_size: int) -> None:
    def make_one(**changes: Any) -> torch.Tensor:
        return mixed([100, 300, 50], [5, 1, 2], **changes).batch(step)[0]

    parts = [make_one(batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), make_one(batch_size=batch_size * world_size))


def test_rows_stay_inside_their_section_and_visit_all_of_it() -> None:
    batches = mixed([100, 1000], [1, 3], batch_size=_ROUND)
    inputs, targets = batches.batch(3)
    first = inputs[:, 0] < 100
    assert int(first.sum()) == _ROUND // 4
    assert int(targets[first].max()) < 100
    assert int(inputs[~first].min()) >= 100
    assert set(range(8, 92)) <= set(inputs[first].flatten().tolist())
    for section, size in ((first, 11), (~first, 124)):
        starts = inputs[section, 0][:size]
        assert len(set(starts.tolist())) > size // 2


def test_a_section_keeps_its_windows_when_others_come() -> None:
    def rows_of(lengths: list[int], weights: list[float]) -> list[int]:
        inputs, _ = mixed(lengths, weights, batch_size=500).batch(0)
        return [start for start in inputs[:, 0].tolist() if start < 200]

    two, three = rows_of([200, 100], [1, 1]), rows_of([200, 100, 100], [1, 1, 2])
    assert two[: len(three)] == three[: len(two)]


def test_the_order_of_a_mixture_never_changes() -> None:
    batches = mixed([100, 300, 50], [5, 1, 2])
    assert batches.batch(5)[0][:, 0].tolist() == [53, 139, 85, 69]
    assert batches.batch(2000)[0][:, 0].tolist() == [32, 417, 72, 298]
    assert not torch.equal(mixed([100, 300], [1, 1]).batch(5)[0], mixed([100, 300], [1, 1], seed=1).batch(5)[0])


def test_a_section_that_is_too_short_is_named() -> None:
    with pytest.raises(ConfigError, match=r"the training text of data\.sources\.b has only 8 tokens and a row takes 9"):
        mixed([100, 8], [1, 1])


def test_targets_that_are_not_learned() -> None:
    tokens = np.arange(9, dtype=np.uint16)
    learned = np.array([1, 1, 0, 0, 1, 1, 1, 0, 1], dtype=np.uint8)
    inputs, targets = Batches(Stream([Piece(tokens, learned)], begin=5), batch_size=2, seq_len=8, seed=0).batch(0)
    assert inputs[0].tolist() == list(range(8))
    assert targets.tolist() == [[1, -100, -100, 4, -100, 6, -100, 8]] * 2
    assert heldout_windows(Stream([Piece(tokens, learned)]), 8, 8)[1].tolist() == [[1, -100, -100, 4, 5, 6, -100, 8]]
