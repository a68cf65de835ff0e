"""Which keys a query sees."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.blocks.base import Context


def visible_keys(context: Context, num_queries: int, num_keys: int, mask: str, window: int | None) -> Tensor | None:
    """[b or 1, 1, num_queries, num_keys] bool, True where a query sees a key; None: every earlier key, or all of them.

    The keys are the last `num_keys` tokens up to and including the queries, the queries the last `num_queries`. None is
    the answer when the plain causal rule is all there is to say (a single query at the end sees everything).

    Args:
        mask: `causal`, `sliding` (the last `window` keys, itself included) or `chunked` (its own chunk of `window`).
    """
    plain = context.padding is None and context.documents is None
    # Nothing is out of sight: by the window, by the start of a chunk, which is 0 only for the first one.
    held = num_keys if mask == "sliding" else context.past + num_queries
    if plain and (window is None or held <= window) and num_queries in (1, num_keys):
        return None
    key = ("visible", num_queries, num_keys, mask, window)
    return context.once(key, lambda: _visible(context, num_queries, num_keys, mask, window))


def _visible(context: Context, num_queries: int, num_keys: int, mask: str, window: int | None) -> Tensor:
    device = context.positions.device
    end = context.past + num_queries
    query = torch.arange(end - num_queries, end, device=device)[:, None]
    key = torch.arange(end - num_keys, end, device=device)
    seen = key <= query
    if mask == "sliding" and window is not None:
        seen = seen & (query - key < window)
    seen = seen[None]
    if mask == "chunked" and window is not None:
        chunk = _places(context, key).div(window, rounding_mode="floor")
        seen = seen & (chunk[:, -num_queries:, None] == chunk[:, None])
    if context.padding is not None:
        # A padding token sees itself: a row without any key would have no softmax.
        seen = (seen & (key >= context.padding[:, None, None])) | (key == query)
    if context.documents is not None:
        seen = seen & (context.documents[:, -num_queries:, None] == context.documents[:, None, -num_keys:])
    return seen[:, None]


def _places(context: Context, keys: Tensor) -> Tensor:
    """[b or 1, keys] int64: where each key, given by its place in the row, stands in its own document."""
    if context.documents is not None:  # whole rows: the keys are the tokens of this pass
        return context.positions
    return keys[None] if context.padding is None else keys - context.padding[:, None]
