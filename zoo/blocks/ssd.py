"""State-space duality: the recurrence of Mamba-2 as matrix products over chunks (arXiv:2405.21060, section 6).

Letters beside the usual ones: h heads = g groups times r heads a group, p channels of a head, n channels of the state,
c chunks, l (i, j) tokens of a chunk. Head by head, S_0 = start and

    S_t = exp(dt_t a) S_(t-1) + dt_t x_t B_t^T,    y_t = S_t C_t
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHED_ELEMENTS = 2**20
"""On a CPU, chunks are taken together up to this size of their matrices of decays: those then stay in the cache."""


def ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    chunk_size: int,
    start: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over whole sequences.

    Args:
        x: [b, s, h, p], inputs.
        dt: [b, s, h], step sizes, in the dtype of the arithmetic.
        a: [h], rates of decay, below 0.
        b, c: [b, s, g, n], what writes to the state and what reads from it.
        chunk_size: tokens of a chunk. Work and memory a token grow with it, the number of steps falls.
        start: [b, h, p, n], the state before the first token; None: zeros.
        documents: [b, s] int64; the state is zero at the start of each document.

    Returns:
        y [b, s, h, p] and the state after the last token [b, h, p, n], in the dtype of dt.
    """
    if start is None:
        start = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[-1], dtype=dt.dtype)
    result: tuple[Tensor, Tensor] = _SSD.apply(x, dt, a, b, c, start, documents, chunk_size)
    return result


def ssd_step(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """The recurrence for one token: x [b, h, p], dt [b, h], a [h], b and c [b, g, n]; y [b, h, p] in the dtype of dt.

    `state` [b, h, p, n] is updated in place.
    """
    batch, groups = b.shape[:2]
    state *= torch.exp(dt * a)[..., None, None]
    grouped = state.view(batch * groups, -1, state.shape[-1])
    step = (x * dt[..., None]).view(*grouped.shape[:2], 1)
    grouped.baddbmm_(step, b.to(dt.dtype).reshape(batch * groups, 1, -1))
    return (grouped @ c.to(dt.dtype).reshape(batch * groups, -1, 1)).view(x.shape)


@dataclass
class _Chunks:
    """Some chunks of equal length, seen from the recurrence."""

    x: Tensor
    """[b, c, g, r, l, p]."""
    dt: Tensor
    """[b, c, g, r, l]."""
    b: Tensor
    """[b, c, g, l, n]."""
    c: Tensor
    """[b, c, g, l, n]."""
    decay: Tensor
    """[b, c, g, r, l, l]: what is left at token i of what token j wrote."""
    from_start: Tensor
    """[b, c, g, r, l]: what is left of the chunk's first state."""
    to_end: Tensor
    """[b, c, g, r, l]: what is left at the end of what a token wrote."""
    whole: Tensor
    """[b, c, g, r]: what is left at the end of the first state."""

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], a: Tensor, documents: Tensor | None, length: int) -> _Chunks:
        """Chunks of `length` tokens of x, dt, b and c; documents [b, 1 + s] begin with that of the token before."""
        x, dt, b, c = tensors
        groups = b.shape[2]
        x = _by_chunk(x, groups, length)
        dt = rearrange(dt, "b (c l) (g r) -> b c g r l", g=groups, l=length)
        b, c = (rearrange(part, "b (c l) g n -> b c g l n", l=length).to(dt.dtype) for part in (b, c))
        # Differences of sums: in fp32 those of close tokens late in a chunk would have lost their digits.
        exact = dt.dtype if x.device.type == "mps" else torch.float64
        total = torch.cumsum((dt * a.view(groups, -1, 1)).to(exact), -1)
        later = torch.full((length, length), -math.inf, dtype=dt.dtype, device=x.device).triu(1)
        decay = (total[..., None] - total[..., None, :]).to(dt.dtype).add_(later).exp_()
        last = total[..., -1:]
        others = (part.to(dt.dtype).exp() for part in (total, last - total, last[..., 0]))
        chunks = cls(x, dt, b, c, decay, *others)
        if documents is not None:
            chunks._separate(documents)
        return chunks

    def _separate(self, documents: Tensor) -> None:
        length = self.decay.shape[-1]
        own = rearrange(documents[:, 1:], "b (c l) -> b c 1 1 l", l=length)
        before = rearrange(documents[:, :-1], "b (c l) -> b c 1 1 l", l=length)[..., :1]
        self.decay.masked_fill_(own[..., None] != own[..., None, :], 0)
        self.from_start.masked_fill_(own != before, 0)
        self.to_end.masked_fill_(own != own[..., -1:], 0)
        self.whole.masked_fill_((own[..., -1:] != before)[..., 0], 0)

    def scores(self) -> Tensor:
        """[b, c, g, l, l], the products of c_i and b_j."""
        return self.c @ self.b.mT

    def states(self, start: Tensor) -> Tensor:
        """[b, c + 1, g, r, p, n]: the states at the beginning of every chunk, and after the last one."""
        written = self.x * (self.dt * self.to_end)[..., None]
        added = torch.einsum("bcgrlp, bcgln -> bcgrpn", written, self.b)
        states = added.new_empty(added.shape[0], 1 + added.shape[1], *added.shape[2:])
        states[:, 0] = start
        for index, whole in enumerate(self.whole.unbind(1)):
            torch.addcmul(added[:, index], states[:, index], whole[..., None, None], out=states[:, index + 1])
        return states


class _SSD(torch.autograd.Function):
    """Keeps its arguments, its result and one state for each step of `_steps`; the rest is computed again.

    Of a log decay summed over its chunk, token i's output grows with exp(sum_i) and its input with exp(-sum_i); so the
    sum's gradient is <grad y_i, y_i> - <grad x_i, x_i>, and the matrices of decays need none of their own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        start: Tensor,
        documents: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        batch, _, heads, width = x.shape
        y = torch.empty(x.shape, dtype=dt.dtype, device=x.device)
        grouped = _by_group(start, b.shape[2])
        starts = [grouped]
        for tokens, length in _steps(x, chunk_size):
            chunks = _Chunks.of(tuple(part[:, tokens] for part in (x, dt, b, c)), a, _seen(documents, tokens), length)
            states = chunks.states(starts[-1])
            mixing = chunks.decay.mul_(chunks.scores()[:, :, :, None])
            part = mixing @ (chunks.x * chunks.dt[..., None])
            from_start = torch.einsum("bcgln, bcgrpn -> bcgrlp", chunks.c, states[:, :-1])
            part.addcmul_(from_start, chunks.from_start[..., None])
            y[:, tokens] = rearrange(part, "b c g r l p -> b (c l) (g r) p")
            starts.append(states[:, -1].clone())
        ctx.chunk_size = chunk_size
        ctx.save_for_backward(x, dt, a, b, c, y, documents, *starts[:-1])
        return y, starts[-1].reshape(batch, heads, width, -1).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_end: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, a, b, c, y, documents, *starts = ctx.saved_tensors
        grads = tuple(torch.empty_like(part) for part in (x, dt, b, c))
        grad_a = torch.zeros_like(a, dtype=dt.dtype)
        grad_state = _by_group(grad_end, b.shape[2])
        for (tokens, length), start in reversed(list(zip(_steps(x, ctx.chunk_size), starts, strict=True))):
            chunks = _Chunks.of(tuple(part[:, tokens] for part in (x, dt, b, c)), a, _seen(documents, tokens), length)
            outputs, grad_outputs = (_by_chunk(part[:, tokens], b.shape[2], length) for part in (y, grad_y))
            states = chunks.states(start)
            *found, grad_log, grad_state = _backward(chunks, a, states, outputs, grad_outputs, grad_state)
            for grad, part in zip(grads, found, strict=True):
                grad[:, tokens] = part
            grad_a += torch.einsum("bcgrl, bcgrl -> gr", grad_log, chunks.dt).flatten()
        grad_x, grad_dt, grad_b, grad_c = grads
        return grad_x, grad_dt, grad_a.to(a.dtype), grad_b, grad_c, grad_state.flatten(1, 2), None, None


def _backward(
    chunks: _Chunks, a: Tensor, states: Tensor, y: Tensor, grad_y: Tensor, grad_end: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of x, dt, b and c [b, s, ...], of the log decays [b, c, g, r, l], and of the first state.

    y and grad_y are [b, c, g, r, l, p], states [b, c + 1, g, r, p, n] and the gradient of the last one [b, g, r, p, n].
    """
    arriving = grad_y * chunks.from_start[..., None]
    direct = torch.einsum("bcgrlp, bcgln -> bcgrpn", arriving, chunks.c)
    grad_ends = torch.empty_like(direct)
    for index in reversed(range(direct.shape[1])):
        grad_ends[:, index] = grad_end
        grad_end = torch.addcmul(direct[:, index], grad_end, chunks.whole[:, index, ..., None, None])
    inputs = chunks.x * chunks.dt[..., None]
    scores = chunks.scores()
    grad_scores = (grad_y @ inputs.mT).mul_(chunks.decay).sum(3)
    grad_c = torch.einsum("bcgrlp, bcgrpn -> bcgln", arriving, states[:, :-1]) + grad_scores @ chunks.b
    written = inputs * chunks.to_end[..., None]
    grad_b = torch.einsum("bcgrlp, bcgrpn -> bcgln", written, grad_ends) + grad_scores.mT @ chunks.c
    grad_inputs = chunks.decay.mul_(scores[:, :, :, None]).mT @ grad_y
    grad_inputs.addcmul_(torch.einsum("bcgln, bcgrpn -> bcgrlp", chunks.b, grad_ends), chunks.to_end[..., None])

    along = (chunks.x * grad_inputs).sum(-1)
    grad_sum = (grad_y * y).sum(-1) - chunks.dt * along
    grad_sum[..., -1] += (grad_ends * states[:, 1:]).sum((-1, -2))
    grad_log = grad_sum.flip(-1).cumsum(-1).flip(-1)
    grad_dt = along + grad_log * a.view(*grad_log.shape[2:4], 1)
    return (
        rearrange(grad_inputs * chunks.dt[..., None], "b c g r l p -> b (c l) (g r) p"),
        rearrange(grad_dt, "b c g r l -> b (c l) (g r)"),
        rearrange(grad_b, "b c g l n -> b (c l) g n"),
        rearrange(grad_c, "b c g l n -> b (c l) g n"),
        grad_log,
        grad_end,
    )


def _steps(x: Tensor, chunk_size: int) -> Iterator[tuple[slice, int]]:
    """The tokens that are worked on together, a whole number of chunks, and the length of a chunk; at last the rest."""
    batch, num_tokens, heads = x.shape[:3]
    together = max(1, CACHED_ELEMENTS // (batch * heads * chunk_size**2)) if x.device.type == "cpu" else num_tokens
    first = 0
    while first < num_tokens:
        length = min(chunk_size, num_tokens - first)
        last = first + length * min(together, (num_tokens - first) // length)
        yield slice(first, last), length
        first = last


def _seen(documents: Tensor | None, tokens: slice) -> Tensor | None:
    """[b, 1 + s]: the documents of `tokens`, after that of the token before them (their own for the first)."""
    if documents is None:
        return None
    own = documents[:, tokens]
    before = documents[:, max(tokens.start - 1, 0), None]
    return torch.cat((before, own), 1)


def _by_chunk(x: Tensor, groups: int, length: int) -> Tensor:
    """x [b, s, h, p] as [b, c, g, r, l, p]."""
    return rearrange(x, "b (c l) (g r) p -> b c g r l p", g=groups, l=length)


def _by_group(state: Tensor, groups: int) -> Tensor:
    """A state [b, h, p, n] as [b, g, r, p, n]."""
    return state.unflatten(1, (groups, -1))
