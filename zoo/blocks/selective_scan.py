"""The recurrence of Mamba-1, many tokens at a time (arXiv:2312.00752).

Channel by channel, with d channels and n entries of a channel's state:

    h_t = exp(dt_t a) h_(t-1) + dt_t x_t b_t,    y_t = <h_t, c_t>

Every entry fades at its own rate, so there is no form of it in matrix products; what is left is to keep the states of
all tokens out of memory and the steps few.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

MOST_STATES = {"cpu": 2**21}
"""How many entries of states are held at a time, by kind of device: those of a CPU then stay in the cache."""
MOST_STATES_ELSEWHERE = 2**27


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    start: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over whole sequences. Of the states, one for each stretch of tokens is kept for the backward pass.

    Args:
        x, dt: [b, s, d], inputs and step sizes.
        a: [d, n], rates of decay, below 0.
        b, c: [b, s, n], what writes to the states and what reads from them.
        start: [b, d, n], the states before the first token; None: zeros.
        documents: [b, s] int64; the states are zero at the start of each document.

    Returns:
        y [b, s, d] and the states after the last token [b, d, n].
    """
    state = dt.new_zeros(x.shape[0], *a.shape) if start is None else start
    begins = None
    if documents is not None:
        begins = torch.zeros_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    most = MOST_STATES.get(x.device.type, MOST_STATES_ELSEWHERE)
    length = max(1, most // state.numel())
    results = []
    for first in range(0, x.shape[1], length):
        tokens = slice(first, first + length)
        parts = (x[:, tokens], dt[:, tokens], a, b[:, tokens], c[:, tokens], state)
        masked = None if begins is None else begins[:, tokens]
        if torch.is_grad_enabled():
            y, state = checkpoint(_stretch, *parts, masked, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _stretch(*parts, masked)
        results.append(y)
    return torch.cat(results, 1), state


def selective_step(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """The recurrence for one token: x and dt [b, d], a [d, n], b and c [b, n]; y [b, d].

    `state` [b, d, n] is updated in place.
    """
    state.mul_(torch.exp(dt[..., None] * a)).add_(dt[..., None] * b[:, None] * x[..., None])
    return (state @ c.to(state.dtype)[..., None])[..., 0]


def _stretch(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, begins: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`selective_scan` with the states of all tokens in memory; `begins` [b, s] marks the first tokens of documents."""
    decay = torch.exp(dt[..., None] * a)
    if begins is not None:
        decay = decay.masked_fill(begins[..., None, None], 0)
    added = dt[..., None] * b[:, :, None] * x[..., None]
    states: Tensor = _Recurrence.apply(decay, added, start)
    # A copy: a view would keep the states of all tokens for the stretch that begins with it.
    return (states @ c.to(states.dtype)[..., None])[..., 0], states[:, -1].clone()


class _Recurrence(torch.autograd.Function):
    """h_t = decay_t h_(t-1) + added_t along axis 1, h_(-1) = start: decay and added [b, s, ...], start [b, ...]."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, added: Tensor, start: Tensor) -> Tensor:
        states = added.clone()
        states[:, 0].addcmul_(decay[:, 0], start)
        _run(decay.clone(), states)
        ctx.save_for_backward(decay, states, start)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        decay, states, start = ctx.saved_tensors
        # The gradients follow the same recurrence from the last token to the first.
        backwards = grad.flip(1)
        _run(decay.roll(-1, 1).flip(1), backwards)
        grad_added = backwards.flip(1)
        earlier = torch.cat((start[:, None], states[:, :-1]), 1)
        return grad_added * earlier, grad_added, grad_added[:, 0] * decay[:, 0]


def _run(decay: Tensor, h: Tensor) -> None:
    """h_t += decay_t h_(t-1) for t = 1, 2, ... along axis 1, in place; decay is used up, its first entry is not read.

    In about 2 sqrt(s) steps for s tokens: inside tiles of sqrt(s) tokens, all tiles at once, then from tile to tile.
    """
    num_tokens = h.shape[1]
    length = math.isqrt(num_tokens)
    tiled = num_tokens - num_tokens % length
    tiles, decays = (part[:, :tiled].unflatten(1, (-1, length)) for part in (h, decay))
    for token in range(1, length):
        tiles[:, :, token].addcmul_(decays[:, :, token], tiles[:, :, token - 1])
        decays[:, :, token].mul_(decays[:, :, token - 1])
    for tile in range(1, tiles.shape[1]):
        tiles[:, tile].addcmul_(decays[:, tile], tiles[:, tile - 1, -1:])
    for token in range(tiled, num_tokens):
        h[:, token].addcmul_(decay[:, token], h[:, token - 1])
