"""The gated delta rule itself: many tokens at a time as matrix products, or one token at a time.

A head's state S [k, v] follows S <- exp(g_t) S; S <- S + beta_t k_t (v_t - S^T k_t)^T, with the output o_t = S^T q_t. The
log decay g_t <= 0 is one number, or one for each of the k channels. einops letters as everywhere, and `n` chunks, `c`
tokens of a chunk, `r` heads that share a query-key head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable


def delta_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: its output [b, h, v] and the state [b, h, k, v] after it.

    Args:
        q, k: [b, h, k].
        v: [b, h, v].
        log_decay: [b, h, 1 or k].
        beta: [b, h].
        state: [b, h, k, v] before the token.
    """
    decay = log_decay.exp()
    # Both reads in one pass over the old state: S' = decay S + k change^T, so S'^T q = (decay S)^T q + (k . q) change.
    read_k, read_q = (torch.stack((k, q), -2) * decay[..., None, :] @ state).unbind(-2)
    change = beta[..., None] * (v - read_k)
    state = torch.addcmul(state * decay[..., None], k[..., None], change[..., None, :])
    return torch.addcmul(read_q, (q * k).sum(-1, keepdim=True), change), state


def delta_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Many tokens: their outputs [b, s, h, v] and the state [b, h, k, v] after them.

    The updates inside a chunk are one triangular system (arXiv:2406.06484, section 3.2; with decays arXiv:2412.06464,
    section 3.3, and arXiv:2510.26692, section 4), so the sequential part is a pair of matrix products for each chunk. Every
    exponent is at most 0, so no decay is too strong.

    Args:
        q, k: [b, s, g, k]; head h uses query-key head h // (heads / g).
        v: [b, s, h, v].
        log_decay: [b, s, h, 1 or k].
        beta: [b, s, h].
        state: [b, h, k, v] before the first token; None: zeros.
        documents: [b, s]; a document starts from zeros.
        chunk_size: a power of two.
    """
    batch_size, length, heads, v_dim = v.shape
    size = min(chunk_size, 1 << (length - 1).bit_length())
    q, k, v, log_decay, beta = (_chunks(part, size) for part in (q, k, v, log_decay, beta[..., None]))
    if log_decay.shape[-1] > 1 and k.shape[2] < heads:
        q, k = (part.repeat_interleave(heads // k.shape[2], 2) for part in (q, k))
    decay = log_decay.cumsum(-2)
    enter, leave, fade = decay.exp(), (decay[..., -1:, :] - decay).exp(), decay[..., -1, :, None].exp()
    edges = None if documents is None else _edges(_chunks(documents, size, repeat=True))
    if edges is not None:
        enter, leave, fade = enter * edges.enter, leave * edges.leave, fade * edges.fade
    among_keys, among_queries = _pairs(q, k, decay, None if edges is None else edges.same)
    solved = _UnitInverse.apply(among_keys * beta) * beta.mT  # type: ignore[no-untyped-call]
    writes, reads = solved @ v, solved @ _shared(k, enter)
    if state is None:
        state = v.new_zeros(batch_size, heads, k.shape[-1], v_dim)
    new, states = _Scan.apply(writes, reads, _shared(k, leave), fade, state)  # type: ignore[no-untyped-call]
    y = _shared(q, enter) @ states[:-1] + among_queries @ new
    return rearrange(y, "n b h c v -> b (n c) h v")[:, :length], states[-1]


def _chunks(x: Tensor, size: int, repeat: bool = False) -> Tensor:
    """x [b, s, h, k] as [n, b, h, c, k], or [b, s] as [n, b, c]; the last chunk is filled with zeros or the last item."""
    batch_size, length = x.shape[:2]
    missing = -length % size
    if missing:
        filler = x[:, -1:].expand(-1, missing, *x.shape[2:])
        x = torch.cat((x, filler if repeat else torch.zeros_like(filler)), 1)
    if x.ndim == 2:
        return rearrange(x, "b (n c) -> n b c", c=size)
    return rearrange(x, "b (n c) h k -> n b h c k", c=size).contiguous()


class _Edges(NamedTuple):
    """What documents leave of the exchange inside a chunk and over its borders, as masks."""

    same: Tensor
    """[n, b, 1, c, c]: two tokens of one document."""
    enter: Tensor
    """[n, b, 1, c, 1]: the chunk's first state is of the token's document."""
    leave: Tensor
    """[n, b, 1, c, 1]: the token is of the document of the chunk's last state."""
    fade: Tensor
    """[n, b, 1, 1, 1]: the first state is of the document of the last."""


def _edges(documents: Tensor) -> _Edges:
    last = documents[..., -1]
    before = torch.cat((documents[:1, :, 0], last[:-1]))
    same = documents[..., :, None] == documents[..., None, :]
    enter, leave = documents == before[..., None], documents == last[..., None]
    return _Edges(
        same[:, :, None], enter[:, :, None, :, None], leave[:, :, None, :, None], (last == before)[..., None, None, None]
    )


def _shared(x: Tensor, factor: Tensor) -> Tensor:
    """x [n, b, g, ...] of query-key heads times factor [n, b, h, ...] of the heads that share them: [n, b, h, ...]."""
    if x.shape[2] == factor.shape[2]:
        return x * factor
    return (x[:, :, :, None] * factor.unflatten(2, (x.shape[2], -1))).flatten(2, 3)


def _pairs(q: Tensor, k: Tensor, decay: Tensor, same: Tensor | None) -> tuple[Tensor, Tensor]:
    """Products of each token with the earlier ones of its chunk, faded: keys with keys, queries with keys [n, b, h, c, c].

    Only what is below the diagonal of the first counts; the second is zero above it.

    Args:
        decay: [n, b, h, c, 1 or k], summed from the start of the chunk.
    """
    if decay.shape[-1] > 1:
        among_keys, among_queries = _ChannelPairs.apply(q, k, decay)  # type: ignore[no-untyped-call]
        return (among_keys, among_queries) if same is None else (among_keys * same, among_queries * same)
    size = k.shape[-2]
    apart = torch.ones(size, size, dtype=torch.bool, device=k.device).triu(1)
    faded = (decay - decay.mT).masked_fill(apart if same is None else apart | ~same, -torch.inf).exp()
    return _shared(k @ k.mT, faded), _shared(q @ k.mT, faded)


def _diagonal_blocks(x: Tensor, size: int) -> Tensor:
    """The blocks of `size` on the diagonal of x [..., c, c] as a view [..., c / size, size, size]."""
    count = x.shape[-1] // size
    return x.unflatten(-1, (count, size)).unflatten(-3, (count, size)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """First and second halves [..., c / (2 half), half, k] of the blocks of x [..., c, k] along its tokens."""
    first, second = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return first, second


class _ChannelPairs(torch.autograd.Function):
    """Products of tokens with a decay for each channel: sum_k x_ik y_jk exp(decay_ik - decay_jk), below the diagonal.

    A block is halved again and again: its second half meets its first by way of the token between them, which splits the
    exponent into two of which neither is above 0, and makes it a matrix product.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, decay)
        size = k.shape[-2]
        among_keys = k.new_zeros(*k.shape[:-1], size)
        among_queries = torch.diag_embed((q * k).sum(-1))
        half = 1
        while half < size:
            late_q, late_k, early_k, _, _ = _meeting(q, k, decay, half)
            _diagonal_blocks(among_keys, 2 * half)[..., half:, :half] = late_k @ early_k.mT
            _diagonal_blocks(among_queries, 2 * half)[..., half:, :half] = late_q @ early_k.mT
            half *= 2
        return among_keys, among_queries

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_keys: Tensor, grad_queries: Tensor) -> tuple[Tensor, ...]:
        q, k, decay = ctx.saved_tensors
        # The gradients of each role apart: a late token's factor is x exp(decay), an early one's x exp(-decay), so the
        # gradient of its decay is x times that of x, with the sign of its role; the token between cancels.
        grad_q, grad_late, grad_early = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(k)
        half = 1
        while half < k.shape[-2]:
            late_q, late_k, early_k, late, early = _meeting(q, k, decay, half)
            from_keys = _diagonal_blocks(grad_keys, 2 * half)[..., half:, :half]
            from_queries = _diagonal_blocks(grad_queries, 2 * half)[..., half:, :half]
            _halves(grad_q, half)[1].addcmul_(from_queries @ early_k, late)
            _halves(grad_late, half)[1].addcmul_(from_keys @ early_k, late)
            _halves(grad_early, half)[0].addcmul_(from_queries.mT @ late_q + from_keys.mT @ late_k, early)
            half *= 2
        grad_decay = q * grad_q + k * (grad_late - grad_early)
        own = grad_queries.diagonal(dim1=-2, dim2=-1)[..., None]
        return grad_q.addcmul_(own, k), (grad_late + grad_early).addcmul_(own, q), grad_decay


def _meeting(q: Tensor, k: Tensor, decay: Tensor, half: int) -> tuple[Tensor, ...]:
    """Late queries and keys and early keys, each faded to the token between the halves, and the factors of both."""
    early_decay, late_decay = _halves(decay, half)
    between = early_decay[..., -1:, :]
    late, early = (late_decay - between).exp(), (between - early_decay).exp()
    return _halves(q, half)[1] * late, _halves(k, half)[1] * late, _halves(k, half)[0] * early, late, early


class _UnitInverse(torch.autograd.Function):
    """(I + L)^-1 [..., c, c], L what is below the diagonal of the input: two halves at a time, all in matrix products.

    As exact as substitution: the inverse of [[A, 0], [B, C]] is [[A^-1, 0], [-C^-1 B A^-1, C^-1]].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        size = x.shape[-1]
        inverse = torch.eye(size, dtype=x.dtype, device=x.device).expand(x.shape).clone()
        half = 1
        while half < size:
            blocks = _diagonal_blocks(inverse, 2 * half)
            below = _diagonal_blocks(x, 2 * half)[..., half:, :half]
            blocks[..., half:, :half] = -(blocks[..., half:, half:] @ below @ blocks[..., :half, :half])
            half *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


class _Scan(torch.autograd.Function):
    """The part that goes chunk by chunk: new_i = writes_i - reads_i S_i; S_(i+1) = fade_i S_i + keys_i^T new_i.

    From writes [n, b, h, c, v], reads and keys [n, b, h, c, k], fade [n, b, h, 1 or k, 1] and the first state [b, h, k, v]
    it makes new [n, b, h, c, v] and all states [n + 1, b, h, k, v].
    """

    @staticmethod
    def forward(
        ctx: Any, writes: Tensor, reads: Tensor, keys: Tensor, fade: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        new, states = writes.clone(), state.new_empty(len(writes) + 1, *state.shape)
        states[0] = state
        # bmm works on [b h, ...]; these are views.
        flat_new, flat_states, flat_reads, flat_keys = (part.flatten(1, 2) for part in (new, states, reads, keys))
        for i in range(len(writes)):
            flat_new[i].baddbmm_(flat_reads[i], flat_states[i], alpha=-1)
            torch.mul(states[i], fade[i], out=states[i + 1])
            flat_states[i + 1].baddbmm_(flat_keys[i].mT, flat_new[i])
        ctx.save_for_backward(reads, keys, fade, new, states)
        return new, states

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_new: Tensor, grad_states: Tensor) -> tuple[Tensor, ...]:
        reads, keys, fade, new, states = ctx.saved_tensors
        grad_new, grad_states = grad_new.clone(), grad_states.clone()
        flat_new, flat_states, flat_reads, flat_keys = (
            part.flatten(1, 2) for part in (grad_new, grad_states, reads, keys)
        )
        for i in reversed(range(len(reads))):
            flat_new[i].baddbmm_(flat_keys[i], flat_states[i + 1])
            grad_states[i].addcmul_(grad_states[i + 1], fade[i])
            flat_states[i].baddbmm_(flat_reads[i].mT, flat_new[i], alpha=-1)
        before, after = states[:-1], grad_states[1:]
        grad_fade = (before * after).sum(-1, keepdim=True)
        grad_fade = grad_fade if fade.shape[-2] > 1 else grad_fade.sum(-2, keepdim=True)
        return grad_new, -(grad_new @ before.mT), new @ after.mT, grad_fade, grad_states[0]
