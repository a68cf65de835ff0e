"""Context parallelism: the tokens of every row divided among processes.

Rows are cut into twice as many pieces as there are processes, and process r of n has the pieces r and 2n - 1 - r: of
causal attention, all then have equally much to do. Attention gathers keys and values of the earlier pieces, and goes
over a piece as generation goes over the next tokens of a text; recurrences start every piece from zeros, gather what
each piece makes of the state before it, and add what is due to the states from which the pieces should have started.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from einops import einsum
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from zoo.blocks.attention import Attention
from zoo.blocks.base import Context, Mixer
from zoo.blocks.conv import CausalConv
from zoo.blocks.delta import GatedDelta
from zoo.blocks.embedding import Embedding, Head
from zoo.blocks.mamba2 import Mamba2
from zoo.blocks.mla import MLA
from zoo.blocks.rope import depends_on_length
from zoo.blocks.short_conv import ShortConv
from zoo.decoder import Decoder
from zoo.parallel.sequence import gather_tokens
from zoo.spec.base import ConfigError


@dataclass(frozen=True)
class Zigzag:
    """Rows [b, s] as pieces [b, s / 2n], numbered in their order; the two of a process stand one after the other."""

    cp: DeviceMesh

    @property
    def own(self) -> tuple[int, int]:
        """The numbers of this process's pieces."""
        return self.of(self.cp.get_local_rank())

    def of(self, rank: int) -> tuple[int, int]:
        """The numbers of the pieces of a process."""
        return rank, 2 * self.cp.size() - 1 - rank

    def take(self, x: Tensor) -> Tensor:
        """The own tokens [b or 1, s / n, ...] of x [b or 1, s, ...], which all processes have."""
        pieces = x.chunk(2 * self.cp.size(), 1)
        return torch.cat([pieces[number] for number in self.own], 1)

    def gather(self, x: Tensor) -> list[Tensor]:
        """All pieces [b, l, d] in order, of the own ones x [b, 2 l, d] of every process. Differentiable."""
        found = gather_tokens(x, self.cp).chunk(2 * self.cp.size(), 1)
        numbers = [number for rank in range(self.cp.size()) for number in self.of(rank)]
        return [piece for _, piece in sorted(zip(numbers, found, strict=True), key=lambda item: item[0])]

    def context(self, rows: Context, number: int) -> Context:
        """A piece as the next tokens of rows, of whose earlier tokens states are held."""

        def make() -> Context:
            length = rows.positions.shape[1] // (2 * self.cp.size())
            start, end = number * length, (number + 1) * length
            documents = None if rows.documents is None else rows.documents[:, :end]
            # Nothing is made again (`sparing`): keys and values that were gathered lie in one tensor.
            return Context(rows.positions[:, start:end], past=start, documents=documents)

        return rows.once(("piece", number), make)

    def documents(self, rows: Tensor | None, earlier: int) -> Tensor | None:
        """[2 b, earlier + l]: of the own pieces of rows [b, s], and of so many tokens before each, one below another.

        Before the first piece they are those of its first token.
        """
        if rows is None:
            return None
        length = rows.shape[1] // (2 * self.cp.size())
        longer = torch.cat((rows[:, :1].expand(-1, earlier), rows), 1)
        return torch.cat([longer[:, number * length : (number + 1) * length + earlier] for number in self.own])


def cut_rows(model: Decoder, cp: DeviceMesh) -> None:
    """Let every mixer of `model` work with the own tokens [b, s / n, d] of rows.

    Raises:
        ConfigError: a mixer cannot.
    """
    zigzag = Zigzag(cp)
    for name, block in model.named_modules():
        if isinstance(block, Mixer):
            rule, reason = _RULES.get(type(block)), _refusal(block)
            if rule is None or reason:
                reason = reason or f"{type(block).__name__}, which does not pass its state on"
                raise ConfigError(f"layout.cp: found {cp.size()}; {name} has {reason}: set cp to 1")
            rule(block, zigzag)


def cut_ends(model: Decoder, cp: DeviceMesh) -> None:
    """Let embedding and head of `model`, where they are, work with the own tokens of whole rows."""
    zigzag = Zigzag(cp)
    if isinstance(model.embed, Embedding):
        look_up = model.embed.forward

        def embed(tokens: Tensor, context: Context) -> Tensor:
            """The embeddings of the own tokens of tokens [b, s]."""
            return look_up(zigzag.take(tokens), replace(context, positions=zigzag.take(context.positions)))

        model.embed.forward = embed  # type: ignore[method-assign]
    if isinstance(model.head, Head):
        logits, cross_entropy = model.head.forward, model.head.cross_entropy

        def all_logits(x: Tensor, embedding: Tensor) -> Tensor:
            """Logits [b, s, vocab] of x [b, s / n, d]."""
            return torch.cat(zigzag.gather(logits(x, embedding)), 1)

        def own_cross_entropy(x: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
            """The sum over the own tokens of targets [b, s]."""
            return cross_entropy(x, embedding, zigzag.take(targets))

        model.head.forward = all_logits  # type: ignore[method-assign]
        model.head.cross_entropy = own_cross_entropy  # type: ignore[method-assign]


def _refusal(block: Mixer) -> str:
    spec = block.spec
    if getattr(spec, "indexer", None) is not None:
        return "an indexer, which chooses among all keys of a row"
    rope = getattr(spec, "rope", None)
    if isinstance(block, Attention) and rope is not None and depends_on_length(rope):
        return f"rope.scaling {rope.scaling.type}, which depends on the last position of whole rows"
    return ""


class _Keys:
    """Stands for the cache of a generation: what attention needs of the earlier pieces. Of one layer, in one pass."""

    def __init__(self, zigzag: Zigzag, window: int | None) -> None:
        self.zigzag, self.window = zigzag, window
        self.known: dict[int, Tensor] = {}
        self.half = 0
        """Which of its pieces every process is at."""
        self.length = 0
        """Tokens before the piece."""

    def at(self, half: int, piece_len: int) -> _Keys:
        """Itself, for a piece of `piece_len` tokens."""
        self.half, self.length = half, self.zigzag.own[half] * piece_len
        return self

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Tensors [b, l, ...] of all tokens up to the end of the own piece, of those of the piece. Differentiable."""
        zigzag, flat = self.zigzag, torch.cat([part.flatten(2) for part in new], -1)
        found = gather_tokens(flat, zigzag.cp).chunk(zigzag.cp.size(), 1)
        self.known |= {zigzag.of(rank)[self.half]: piece for rank, piece in enumerate(found)}
        seen = torch.cat([self.known[number] for number in range(zigzag.own[self.half] + 1)], 1)
        if self.window is not None:
            seen = seen[:, -(self.window - 1 + flat.shape[1]) :]
        parts = seen.split([part[0, 0].numel() for part in new], -1)
        return tuple(part.unflatten(-1, like.shape[2:]).to(like.dtype) for part, like in zip(parts, new, strict=True))


def _by_piece(block: Attention | MLA, zigzag: Zigzag) -> None:
    compute, window = block.forward, getattr(block.spec, "window", None)

    def forward(x: Tensor, context: Context | None = None, state: None = None) -> Tensor:
        assert context is not None
        if context.documents is not None and getattr(block.spec, "mask", "") == "chunked":
            raise ConfigError(
                f"layout.cp: found {zigzag.cp.size()}; with several documents in a row, chunks are not counted across "
                "pieces: set cp to 1"
            )
        keys, parts = _Keys(zigzag, window), x.chunk(2, 1)
        results = [
            compute(part, zigzag.context(context, number), cast(Any, keys.at(half, part.shape[1])))
            for half, (part, number) in enumerate(zip(parts, zigzag.own, strict=True))
        ]
        return torch.cat(results, 1)

    block.forward = forward  # type: ignore[method-assign, assignment]


def _mla(block: MLA, zigzag: Zigzag) -> None:
    # With as many queries as these, keys and values are read out of the latents.
    block.absorbing_pays = lambda num_queries, num_keys: False  # type: ignore[method-assign]
    _by_piece(block, zigzag)


def _convolution(conv: CausalConv, zigzag: Zigzag) -> None:
    compute = conv.forward

    def forward(x: Tensor, context: Context | None = None, state: None = None) -> Tensor:
        """x [b, 2 l, c]."""
        earlier, halves = conv.width - 1, x.chunk(2, 1)
        if halves[0].shape[1] < earlier:
            raise ConfigError(
                f"layout.cp: found {zigzag.cp.size()}; pieces of {halves[0].shape[1]} tokens are shorter than the "
                f"convolution's {earlier} earlier tokens: set a smaller cp, or a larger train.seq_len"
            )
        ends = zigzag.gather(torch.cat([half[:, half.shape[1] - earlier :] for half in halves], 1))
        ends = [torch.zeros_like(ends[0]), *ends]
        joined = torch.cat([torch.cat((ends[n], half), 1) for n, half in zip(zigzag.own, halves, strict=True)])
        documents = zigzag.documents(None if context is None else context.documents, earlier)
        return _side_by_side(compute(joined, replace(Context.of(joined), documents=documents))[:, earlier:])

    conv.forward = forward  # type: ignore[method-assign, assignment]


def _short_conv(block: ShortConv, zigzag: Zigzag) -> None:
    _convolution(block.conv, zigzag)


def _mamba2(block: Mamba2, zigzag: Zigzag) -> None:
    _convolution(block.conv, zigzag)
    compute = block.recur

    def recur(
        x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: None, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, dt, b, c = (_one_below_another(part) for part in (x, dt, b, c))
        own = zigzag.documents(documents, 1)
        y, end = compute(x, dt, a, b, c, None, None if own is None else own[:, 1:])
        left = torch.cumsum((dt * a).to(torch.float64), 1).to(dt.dtype).exp()
        if own is not None:
            left = left.masked_fill((own[:, 1:] != own[:, :1])[..., None], 0)
        starts = _starts(zigzag, lambda state, end, whole: state * whole[..., None, None] + end, end, left[:, -1])
        grouped = starts.unflatten(1, (c.shape[2], -1))
        read = einsum(c.to(dt.dtype), grouped, "b s g n, b g r p n -> b s g r p").flatten(2, 3)
        return _side_by_side(y + read * left[..., None]), end

    block.recur = recur  # type: ignore[method-assign, assignment]


def _delta(block: GatedDelta, zigzag: Zigzag) -> None:
    _convolution(block.conv, zigzag)
    compute = block.recur

    def recur(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, start: None, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay, beta = (_one_below_another(part) for part in (q, k, v, log_decay, beta))
        own = zigzag.documents(documents, 1)
        # Beside the values, channels without any, which start from the unit matrix: what they read and end with is what
        # becomes of any state.
        widths, unit = [v.shape[-1], k.shape[-1]], torch.eye(k.shape[-1], dtype=v.dtype, device=v.device)
        state = torch.cat((unit.new_zeros(len(unit), widths[0]), unit), -1).expand(len(v), v.shape[2], -1, -1)
        v = torch.nn.functional.pad(v, (0, widths[1]))
        both, ends = compute(q, k, v, log_decay, beta, state, None if own is None else own[:, 1:])
        (y, through), (end, passed) = both.split(widths, -1), ends.split(widths, -1)
        if own is not None:
            goes_on = (own[:, 0] == own[:, 1])[:, None, None, None]
            through, passed = through * goes_on, passed * goes_on
        starts = _starts(zigzag, lambda state, end, passed: passed @ state + end, end, passed)
        return _side_by_side(y + einsum(through, starts, "b s h k, b h k v -> b s h v")), end

    block.recur = recur  # type: ignore[method-assign, assignment]


def _starts(zigzag: Zigzag, go_on: Callable[..., Tensor], end: Tensor, *other: Tensor) -> Tensor:
    """The states [2 b, ...] before the own pieces.

    Args:
        go_on: from the state before a piece, and the tensors of that piece, to the state after it.
        end: [2 b, ...], the states after the own pieces if they start from zeros.
        other: [2 b, ...], what else `go_on` is given.
    """
    parts = (end, *other)
    flat = torch.stack(torch.cat([part.flatten(1) for part in parts], -1).chunk(2), 1)
    before = [torch.zeros_like(end[: len(end) // 2])]
    for piece in zigzag.gather(flat)[: max(zigzag.own)]:
        found = piece[:, 0].split([part[0].numel() for part in parts], -1)
        whole = [one.unflatten(-1, part.shape[1:]) for one, part in zip(found, parts, strict=True)]
        before.append(go_on(before[-1], *whole))
    return torch.cat([before[number] for number in zigzag.own])


def _one_below_another(x: Tensor) -> Tensor:
    """The own pieces [2 b, l, ...] of x [b, 2 l, ...]."""
    return torch.cat(x.chunk(2, 1))


def _side_by_side(x: Tensor) -> Tensor:
    """x [b, 2 l, ...] of the own pieces [2 b, l, ...]."""
    return torch.cat(x.chunk(2), 1)


_RULES: dict[type[Mixer], Callable[[Any, Zigzag], None]] = {
    Attention: _by_piece,
    MLA: _mla,
    Mamba2: _mamba2,
    GatedDelta: _delta,
    ShortConv: _short_conv,
}
