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

from zoo.blocks.compiled_mixers import CompiledSSD, fits

CACHED_ELEMENTS = 2**18
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
        chunk_size: tokens of a chunk. Work and memory a token grow with it, the number of steps falls. The compiled
            kernel, which fp32 on a CPU passes where it is loaded, has its own.
        start: [b, h, p, n], the state before the first token; None: zeros.
        documents: [b, s] int64; the state is zero at the start of each document.

    Returns:
        y [b, s, h, p] and the state after the last token [b, h, p, n], in the dtype of dt.
    """
    if start is None:
        start = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[-1], dtype=dt.dtype)
    result: tuple[Tensor, Tensor]
    if fits(x, dt, a, b, c, start):
        result = CompiledSSD.apply(x, dt, a, b, c, start, documents)
    else:
        result = _SSD.apply(x, dt, a, b, c, start, documents, chunk_size)
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
    """Some chunks of equal length, seen from the recurrence; channels of tokens lie in memory as they do for `ssd`."""

    x: Tensor
    """[b, c, l, g, r, p]."""
    dt: Tensor
    """[b, c, l, g, r]."""
    b: Tensor
    """[b, c, g, l, n]."""
    c: Tensor
    """[b, c, g, l, n]."""
    decay: Tensor
    """[b, c, g, r, l, l]: what is left at token i of what token j wrote."""
    from_start: Tensor
    """[b, c, l, g, r]: what is left of the chunk's first state."""
    to_end: Tensor
    """[b, c, l, g, r]: what is left at the end of what a token wrote."""
    whole: Tensor
    """[b, c, g, r]: what is left at the end of the first state."""

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], a: Tensor, documents: Tensor | None, length: int) -> _Chunks:
        """Chunks of `length` tokens of x, dt, b and c; documents [b, 1 + s] begin with that of the token before."""
        x, dt, b, c = tensors
        groups = b.shape[2]
        x, dt = _cut(x, groups, length), _cut(dt, groups, length)
        b, c = (rearrange(part, "b (c l) g n -> b c g l n", l=length).to(dt.dtype).contiguous() for part in (b, c))
        # Differences of sums: in fp32 those of close tokens late in a chunk would have lost their digits.
        total = torch.cumsum((dt * a.view(groups, -1)).to(_exact(dt)), 2)
        by_head = rearrange(total, "b c l g r -> b c g r l").contiguous()
        later = torch.full((length, length), -math.inf, dtype=dt.dtype, device=x.device).triu(1)
        decay = (by_head[..., None] - by_head[..., None, :]).to(dt.dtype).add_(later).exp_()
        last = total[:, :, -1:]
        others = (part.to(dt.dtype).exp() for part in (total, last - total, last[:, :, 0]))
        chunks = cls(x, dt, b, c, decay, *others)
        if documents is not None:
            chunks._separate(documents)
        return chunks

    def _separate(self, documents: Tensor) -> None:
        own = documents[:, 1:].unflatten(1, (-1, self.decay.shape[-1]))
        before = documents[:, :-1].unflatten(1, (-1, self.decay.shape[-1]))[..., :1]
        last = own[..., -1:]
        self.decay.masked_fill_((own[..., None] != own[..., None, :])[:, :, None, None], 0)
        self.from_start.masked_fill_((own != before)[..., None, None], 0)
        self.to_end.masked_fill_((own != last)[..., None, None], 0)
        self.whole.masked_fill_((last != before)[..., None], 0)

    def scores(self) -> Tensor:
        """[b, c, g, 1, l, l], the products of c_i and b_j."""
        return (self.c @ self.b.mT)[:, :, :, None]

    def inputs(self) -> Tensor:
        """dt x by head, [b, c, g, r, l, p]."""
        return _by_head(self.x, self.dt)

    def written(self) -> Tensor:
        """What of dt x is left at the end of the chunk, [b, c, l, g, r, p]."""
        return self.x * (self.dt * self.to_end)[..., None]

    def states(self, start: Tensor) -> Tensor:
        """[b, c + 1, g, (r p), n]: the states at the beginning of every chunk, and after the last one."""
        added = _by_group(self.written()).mT @ self.b
        states = torch.cat((start[:, None], added), 1)
        for index, whole in enumerate(self.whole_rows().unbind(1)):
            states[:, index + 1].addcmul_(states[:, index], whole)
        return states

    def whole_rows(self) -> Tensor:
        """`whole` for each row of a state, [b, c, g, (r p), 1]."""
        return self.whole.repeat_interleave(self.x.shape[-1], -1)[..., None]

    def off(self, states: Tensor) -> Tensor:
        """What the tokens read of the chunks' first states, were nothing lost of them: [b, c, l, g, r, p]."""
        return self.by_token(self.c @ states[:, :-1].mT)

    def by_token(self, rows: Tensor) -> Tensor:
        """[b, c, g, l, (r p)] as [b, c, l, g, r, p]."""
        return rows.transpose(2, 3).unflatten(-1, self.x.shape[-2:])


class _SSD(torch.autograd.Function):
    """Keeps its arguments and one state for each step of `_steps`; the rest is computed again in the backward pass."""

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
        groups = b.shape[2]
        y = torch.empty(x.shape, dtype=dt.dtype, device=x.device)
        starts = [_rows(start, groups)]
        for tokens, length in _steps(x, chunk_size):
            chunks = _Chunks.of(tuple(part[:, tokens] for part in (x, dt, b, c)), a, _seen(documents, tokens), length)
            states = chunks.states(starts[-1])
            part = _cut(y[:, tokens], groups, length)
            part.copy_(rearrange(chunks.decay.mul_(chunks.scores()) @ chunks.inputs(), "b c g r l p -> b c l g r p"))
            part.addcmul_(chunks.off(states), chunks.from_start[..., None])
            starts.append(states[:, -1].clone())
        ctx.chunk_size = chunk_size
        ctx.save_for_backward(x, dt, a, b, c, documents, *starts[:-1])
        return y, starts[-1].view_as(start).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_end: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, a, b, c, documents, *starts = ctx.saved_tensors
        groups = b.shape[2]
        grads = tuple(torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, dt, b, c))
        grad_a = torch.zeros_like(a, dtype=dt.dtype)
        grad_state = _rows(grad_end, groups)
        for (tokens, length), start in reversed(list(zip(_steps(x, ctx.chunk_size), starts, strict=True))):
            chunks = _Chunks.of(tuple(part[:, tokens] for part in (x, dt, b, c)), a, _seen(documents, tokens), length)
            grad_tokens = _cut(grad_y[:, tokens], groups, length)
            *found, grad_log, grad_state = _backward(chunks, a, chunks.states(start), grad_tokens, grad_state)
            for grad, part in zip(grads, found, strict=True):
                grad[:, tokens] = part.reshape(grad[:, tokens].shape)
            grad_a += (grad_log * chunks.dt).sum((0, 1, 2)).flatten()
        grad_x, grad_dt, grad_b, grad_c = grads
        return grad_x, grad_dt, grad_a.to(a.dtype), grad_b, grad_c, grad_state.reshape_as(grad_end), None, None


def _backward(chunks: _Chunks, a: Tensor, states: Tensor, grad_y: Tensor, grad_end: Tensor) -> tuple[Tensor, ...]:
    """The gradients of x [b, c, l, g, r, p], dt [b, c, l, g, r], b and c [b, c, l, g, n], of the log decays
    [b, c, l, g, r], and of the first state.

    grad_y is [b, c, l, g, r, p], states [b, c + 1, g, (r p), n] and the gradient of the last one [b, g, (r p), n].
    """
    arriving = grad_y * chunks.from_start[..., None]
    grad_ends, grad_start = _run_back(_by_group(arriving).mT @ chunks.c, chunks.whole_rows(), grad_end)
    starts, written = states[:, :-1], chunks.written()
    read = chunks.by_token(chunks.b @ grad_ends.mT)

    scores, grad_heads = chunks.scores(), _by_head(grad_y)
    grad_pairs = (grad_heads @ chunks.inputs().mT).mul_(chunks.decay)
    grad_scores = grad_pairs.sum(3)
    grad_c = _by_group(arriving) @ starts + grad_scores @ chunks.b
    grad_b = _by_group(written) @ grad_ends + grad_scores.mT @ chunks.c
    grad_log = _grad_log_decay(
        grad_pairs.mul_(scores),
        (arriving * chunks.off(states)).sum(-1),
        (written * read).sum(-1),
        chunks.whole * (grad_ends * starts).sum(-1).unflatten(-1, (chunks.x.shape[-2], -1)).sum(-1),
    )
    grad_inputs = rearrange(chunks.decay.mul_(scores).mT @ grad_heads, "b c g r l p -> b c l g r p")
    grad_inputs = torch.addcmul(grad_inputs, read, chunks.to_end[..., None])
    grad_dt = (chunks.x * grad_inputs).sum(-1) + grad_log * a.view(*grad_log.shape[3:])
    grad_b, grad_c = grad_b.transpose(2, 3), grad_c.transpose(2, 3)
    return grad_inputs.mul_(chunks.dt[..., None]), grad_dt, grad_b, grad_c, grad_log, grad_start


def _run_back(direct: Tensor, whole: Tensor, grad_end: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the states after each chunk, and of the first one.

    Args:
        direct: [b, c, g, (r p), n], of the states at the beginning of each chunk, by what its tokens read of them.
        whole: [b, c, g, (r p), 1], what of those is left at the end.
        grad_end: [b, g, (r p), n], of the state after the last chunk.
    """
    grads = torch.cat((direct, grad_end[:, None]), 1)
    for index in reversed(range(direct.shape[1])):
        grads[:, index].addcmul_(grads[:, index + 1], whole[:, index])
    return grads[:, 1:], grads[:, 0]


def _grad_log_decay(pairs: Tensor, from_start: Tensor, to_end: Tensor, whole: Tensor) -> Tensor:
    """The gradients of the log decays of tokens [b, c, l, g, r], from those of sums of log decays.

    Args:
        pairs: [b, c, g, r, l, l], of the sums after token j up to token i.
        from_start: [b, c, l, g, r], of the sums up to token i.
        to_end: [b, c, l, g, r], of the sums after token j.
        whole: [b, c, g, r], of the sum of all.
    """
    # Of a token's own terms nothing may be left: subtracted in fp32, their rounding would outweigh a small gradient.
    exact = _exact(pairs)
    among = pairs.sum(-1, dtype=exact) - pairs.sum(-2, dtype=exact)
    up_to = rearrange(among, "b c g r l -> b c l g r") + from_start
    grad = up_to.flip(2).cumsum(2).flip(2).to(pairs.dtype) + whole[:, :, None]
    grad[:, :, 1:] += to_end.cumsum(2)[:, :, :-1]
    return grad


def _exact(x: Tensor) -> torch.dtype:
    """The dtype for sums whose differences matter."""
    return x.dtype if x.device.type == "mps" else torch.float64


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


def _cut(x: Tensor, groups: int, length: int) -> Tensor:
    """A view of x [b, s, h, ...] as [b, c, l, g, r, ...]."""
    return x.unflatten(2, (groups, -1)).unflatten(1, (-1, length))


def _by_group(x: Tensor) -> Tensor:
    """x [b, c, l, g, r, p] as matrices of its groups, [b, c, g, l, (r p)]."""
    return x.flatten(-2).transpose(2, 3)


def _by_head(x: Tensor, factor: Tensor | None = None) -> Tensor:
    """x [b, c, l, g, r, p], times a factor [b, c, l, g, r], as matrices of its heads, [b, c, g, r, l, p]."""
    order = "b c l g r p -> b c g r l p"
    x = rearrange(x, order)
    result = torch.empty(x.shape, dtype=x.dtype if factor is None else factor.dtype, device=x.device)
    return result.copy_(x) if factor is None else torch.mul(x, rearrange(factor[..., None], order), out=result)


def _rows(state: Tensor, groups: int) -> Tensor:
    """A state [b, h, p, n] as [b, g, (r p), n]."""
    return state.unflatten(1, (groups, -1)).flatten(2, 3)
