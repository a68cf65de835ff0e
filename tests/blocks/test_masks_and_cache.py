"""Which keys are seen, against brute force; and what a cache keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.blocks.base import Context
from zoo.blocks.cache import GrowingCache
from zoo.blocks.masks import visible_keys


def sees(query: int, key: int, mask: str, window: int | None, pad: int) -> bool:
    if key > query or (key < pad and key != query):
        return False
    if mask == "sliding":
        return query - key < window
    if mask == "chunked":
        return (query - pad) // window == (key - pad) // window or key == query
    return True


@settings(deadline=None, max_examples=200)
@given(
    mask=st.sampled_from(["causal", "sliding", "chunked"]),
    window=st.integers(1, 7),
    past=st.integers(0, 9),
    num_queries=st.integers(1, 9),
    pad=st.none() | st.integers(0, 5),
)
def test_visible_keys_are_those_of_the_rule(
    mask: str, window: int, past: int, num_queries: int, pad: int | None
) -> None:
    limit = None if mask == "causal" else window
    held = past if limit is None else min(past, limit - 1)
    num_keys = held + num_queries
    positions = torch.arange(past, past + num_queries)[None]
    context = Context(positions, past, None if pad is None else torch.tensor([pad]))
    found = visible_keys(context, num_queries, num_keys, mask, limit)
    end = past + num_queries
    expected = torch.tensor(
        [
            [sees(query, key, mask, limit, pad or 0) for key in range(end - num_keys, end)]
            for query in range(end - num_queries, end)
        ]
    )
    if found is None:  # what fused attention does without a mask: causal over a square, everything for one query
        found = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)[None, None]
        assert num_queries in (1, num_keys)
    assert torch.equal(found[0, 0], expected)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 5]])
def test_a_cache_gives_back_what_may_be_seen(window: int | None, pieces: list[int]) -> None:
    keys, values = torch.randn(2, 12, 3, 4), torch.randn(2, 12, 3, 5)
    cache = GrowingCache(2, 12, window, keys.device, keys.dtype)
    end = 0
    for length in pieces:
        start, end = end, end + length
        k, v = cache.append(keys[:, start:end], values[:, start:end])
        first = 0 if window is None else max(0, start - window + 1)
        assert torch.equal(k, keys[:, first:end])
        assert torch.equal(v, values[:, first:end])


@pytest.mark.parametrize("window", [1, 7, 300])
def test_a_window_moves_within_its_buffers(window: int) -> None:
    """One token at a time, some written by the caller: nothing is allocated anew, however long the text."""
    keys = torch.randn(2, 500, 3)
    cache = GrowingCache(2, 500, window, keys.device, keys.dtype)
    (found,) = cache.append(keys[:, :1])
    place = cache.buffers[0].data_ptr()
    for end in range(2, 501):
        if end % 3:
            (found,) = cache.append(keys[:, end - 1 : end])
            assert torch.equal(found, keys[:, max(0, end - window) : end])
        else:
            cache.buffers[0][:, cache.advance(1)] = keys[:, end - 1]
        assert cache.buffers[0].data_ptr() == place
    assert cache.capacity < max(window + 80, 1.3 * window)


def test_a_cache_selects_rows_and_refuses_to_overflow() -> None:
    keys = torch.randn(3, 4, 2)
    cache = GrowingCache(3, 5, None, keys.device, keys.dtype)
    cache.append(keys)
    cache.select(torch.tensor([2, 0]))
    (found,) = cache.append(keys[:2, :1])
    assert torch.equal(found[:, :4], keys[[2, 0]])
    with pytest.raises(ValueError, match="holds 5 tokens, 6 were appended"):
        cache.append(keys[:2, :1])
