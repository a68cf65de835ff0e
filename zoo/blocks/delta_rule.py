"""The gated delta rule itself: many tokens at a time as matrix products, or one token at a time.

A head's state S [k, v] follows S <- exp(g_t) S; S <- S + beta_t k_t (v_t - S^T k_t)^T, with the output o_t = S^T q_t.
The log decay g_t <= 0 is one number, or one for each of the k channels. Letters of shapes: `n` chunks, `c` tokens of a
chunk, `g` query-key heads, each shared by some of the `h` heads, `k` and `v` channels of a key and of a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.blocks.compiled_mixers import CompiledDelta, fits


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

    The updates inside a chunk are one triangular system (arXiv:2406.06484; with decays arXiv:2412.06464 and
    arXiv:2510.26692), so the sequential part is a pair of matrix products for each chunk. Every exponent is a sum of
    log decays, never a difference of sums: no decay is too strong, and none loses its digits to another.

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
    if state is None:
        state = v.new_zeros(batch_size, heads, k.shape[-1], v_dim)
    if log_decay.shape[-1] == 1 and fits(v, q, k, log_decay, beta, state):
        found: tuple[Tensor, Tensor] = CompiledDelta.apply(q, k, v, log_decay[..., 0], beta, state, documents)
        return found
    size = min(chunk_size, 1 << (length - 1).bit_length())
    q, k, v, log_decay, beta = (_chunks(part, size) for part in (q, k, v, log_decay, beta[..., None]))
    if log_decay.shape[-1] > 1 and k.shape[2] < heads:
        q, k = (part.repeat_interleave(heads // k.shape[2], 2) for part in (q, k))
    enter, leave = log_decay.cumsum(-2).exp(), _until_end(log_decay).exp()
    fade = enter[..., -1, :, None]
    edges = None if documents is None else _edges(_chunks(documents, size, repeat=True))
    if edges is not None:
        enter, leave, fade = enter * edges.enter, leave * edges.leave, fade * edges.fade
    among_keys, among_queries = _pairs(q, k, log_decay, None if edges is None else edges.same)
    solved = _UnitInverse.apply(among_keys * beta) * beta.mT
    writes, reads = solved @ v, solved @ _shared(k, enter)
    new, before, last = _Scan.apply(writes, reads, _shared(k, leave), fade, state)
    y = _shared(q, enter) @ before + among_queries @ new
    return rearrange(y, "n b h c v -> b (n c) h v")[:, :length], last


def _chunks(x: Tensor, size: int, repeat: bool = False) -> Tensor:
    """x [b, s, h, k] as [n, b, h, c, k], or [b, s] as [n, b, c]; zeros or the last item fill the last chunk."""
    missing = -x.shape[1] % size
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
    tokens = documents[:, :, None, :, None]
    return _Edges(
        same=tokens == tokens.mT,
        enter=tokens == before[:, :, None, None, None],
        leave=tokens == last[:, :, None, None, None],
        fade=(last == before)[:, :, None, None, None],
    )


def _until_end(log_decay: Tensor) -> Tensor:
    """For each token of [..., c, k] the sum of those after it."""
    return F.pad(log_decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _shared(x: Tensor, factor: Tensor) -> Tensor:
    """x [n, b, g, ...] of query-key heads times factor [n, b, h, ...] of the heads that share them: [n, b, h, ...]."""
    if x.shape[2] == factor.shape[2]:
        return x * factor
    return (x[:, :, :, None] * factor.unflatten(2, (x.shape[2], -1))).flatten(2, 3)


def _pairs(q: Tensor, k: Tensor, log_decay: Tensor, same: Tensor | None) -> tuple[Tensor, Tensor]:
    """Products of each token with the earlier ones of its chunk, faded: keys with keys and queries with keys.

    Both [n, b, h, c, c]. Only what is below the diagonal of the first counts; the second is zero above it.
    """
    if log_decay.shape[-1] > 1:
        among_keys, among_queries = _ChannelPairs.apply(q, k, log_decay)
        return (among_keys, among_queries) if same is None else (among_keys * same, among_queries * same)
    size = k.shape[-2]
    earlier = torch.ones(size, size, dtype=torch.bool, device=k.device).tril(-1)
    # Entry (i, j) sums the log decays of j + 1 ... i (arXiv:2405.21060, listing 1).
    between = log_decay.expand(*log_decay.shape[:-1], size).masked_fill(~earlier, 0).cumsum(-2)
    apart = earlier.mT if same is None else earlier.mT | ~same
    faded = between.masked_fill(apart, -torch.inf).exp()
    return _shared(k @ k.mT, faded), _shared(q @ k.mT, faded)


def _diagonal_blocks(x: Tensor, size: int) -> Tensor:
    """The blocks of `size` on the diagonal of x [..., c, c] as a view [..., c / size, size, size]."""
    count = x.shape[-1] // size
    return x.unflatten(-1, (count, size)).unflatten(-3, (count, size)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _below(x: Tensor, half: int) -> Tensor:
    """Second halves against first [..., c / size, half, half] in the blocks of size = 2 half on the diagonal of x."""
    return _diagonal_blocks(x, 2 * half)[..., half:, :half]


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """First and second halves [..., c / (2 half), half, k] of the blocks of x [..., c, k] along its tokens."""
    first, second = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return first, second


def _meetings(log_decay: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For blocks of size 2, 4, ... c: half the size, the factors by which a state fades from the middle of the block to
    each token of its second half, and from each token of its first half to the middle: [..., c / size, half, k]."""
    since, until, half = log_decay.clone(), torch.zeros_like(log_decay), 1
    while half < log_decay.shape[-2]:
        (first, late), (early, _) = _halves(since, half), _halves(until, half)
        yield half, late.exp(), early.exp()
        early += late[..., -1:, :]
        late += first[..., -1:, :]
        half *= 2


class _ChannelPairs(torch.autograd.Function):
    """The pairs with a decay for each channel: sum_k x_ik y_jk exp(log decays of j + 1 ... i in channel k).

    A block is halved again and again: its second half meets its first by way of the middle, which splits the exponent
    into two of which neither is above 0, and makes the sum a matrix product.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, log_decay)
        among_keys = k.new_zeros(*k.shape[:-1], k.shape[-2])
        among_queries = torch.diag_embed((q * k).sum(-1))
        for half, late, early in _meetings(log_decay):
            early_k = (_halves(k, half)[0] * early).mT
            _below(among_keys, half).copy_((_halves(k, half)[1] * late) @ early_k)
            _below(among_queries, half).copy_((_halves(q, half)[1] * late) @ early_k)
        return among_keys, among_queries

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_keys: Tensor, grad_queries: Tensor) -> tuple[Tensor, ...]:
        q, k, log_decay = ctx.saved_tensors
        grad_q, grad_late, grad_early = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(k)
        for half, late, early in _meetings(log_decay):
            (early_k, late_k), (_, late_q) = _halves(k, half), _halves(q, half)
            from_keys, from_queries = _below(grad_keys, half), _below(grad_queries, half)
            faded = early_k * early
            _halves(grad_q, half)[1].addcmul_(from_queries @ faded, late)
            _halves(grad_late, half)[1].addcmul_(from_keys @ faded, late)
            met = from_queries.mT @ (late_q * late) + from_keys.mT @ (late_k * late)
            _halves(grad_early, half)[0].addcmul_(met, early)
        # With log decays summed from the chunk's start, a late token is x exp(sum) and an early one x exp(-sum): the
        # gradient of the sum is x times that of x, with the sign of its role.
        grad_sum = q * grad_q + k * (grad_late - grad_early)
        own = grad_queries.diagonal(dim1=-2, dim2=-1)[..., None]
        grad_k = (grad_late + grad_early).addcmul_(own, q)
        return grad_q.addcmul_(own, k), grad_k, grad_sum.flip(-2).cumsum(-2).flip(-2)


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
            first, second = blocks[..., :half, :half], blocks[..., half:, half:]
            _below(inverse, half).copy_((second @ _below(x, half) @ first).neg_())
            half *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return (inverse.mT @ grad @ inverse.mT).tril_(-1).neg_()


class _Scan(torch.autograd.Function):
    """The part that goes chunk by chunk: new_i = writes_i - reads_i S_i; S_(i+1) = fade_i S_i + keys_i^T new_i.

    From writes [n, b, h, c, v], reads and keys [n, b, h, c, k], fade [n, b, h, 1 or k, 1] and the first state
    [b, h, k, v] it makes new [n, b, h, c, v], the state before each chunk [n, b, h, k, v] and the last [b, h, k, v].
    """

    @staticmethod
    def forward(
        ctx: Any, writes: Tensor, reads: Tensor, keys: Tensor, fade: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        new, states = torch.empty_like(writes), state.new_empty(len(writes) + 1, *state.shape)
        states[0] = state
        # Views: a batched product takes [b h, ...].
        flat_new, flat_states = new.flatten(1, 2), states.flatten(1, 2)
        flat_writes, flat_reads, flat_keys = (part.flatten(1, 2) for part in (writes, reads, keys))
        for i in range(len(writes)):
            torch.baddbmm(flat_writes[i], flat_reads[i], flat_states[i], alpha=-1, out=flat_new[i])
            torch.mul(states[i], fade[i], out=states[i + 1])
            torch.baddbmm(flat_states[i + 1], flat_keys[i].mT, flat_new[i], out=flat_states[i + 1])
        before, last = states[:-1], states[-1]
        ctx.save_for_backward(reads, keys, fade, new, before)
        return new, before, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_new: Tensor, grad_before: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
        reads, keys, fade, new, before = ctx.saved_tensors
        grad_new, grads = grad_new.clone(), torch.cat((grad_before, grad_last[None]))
        flat_new, flat_grads, flat_reads, flat_keys = (part.flatten(1, 2) for part in (grad_new, grads, reads, keys))
        for i in reversed(range(len(reads))):
            flat_new[i].baddbmm_(flat_keys[i], flat_grads[i + 1])
            grads[i].addcmul_(grads[i + 1], fade[i])
            flat_grads[i].baddbmm_(flat_reads[i].mT, flat_new[i], alpha=-1)
        after = grads[1:]
        grad_fade = (before * after).sum(-1, keepdim=True)
        grad_fade = grad_fade if fade.shape[-2] > 1 else grad_fade.sum(-2, keepdim=True)
        return grad_new, (grad_new @ before.mT).neg_(), new @ after.mT, grad_fade, grads[0]
