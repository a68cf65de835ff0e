"""The experts' fast path: one autograd function over rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.blocks.activation import activate
from zoo.blocks.autocast import without_autocast
from zoo.blocks.dispatch import Dispatch, sum_rows
from zoo.spec.mlp import ActivationSpec


class ExpertWeights(NamedTuple):
    """The stacked parameters of experts, or those of one expert without the leading axis."""

    first: Tensor
    """[e, 2f, d] with the gate's rows above the up rows, or [e, f, d] ungated."""
    down: Tensor
    """[e, d, f]."""
    first_bias: Tensor | None = None
    """[e, 2f] or [e, f]."""
    down_bias: Tensor | None = None
    """[e, d]."""

    def of(self, expert: int, dtype: torch.dtype) -> ExpertWeights:
        """One expert's, in `dtype`: casting one at a time keeps the copy in cache and skips experts without tokens."""
        return ExpertWeights(*(None if part is None else part[expert].to(dtype) for part in self))  # type: ignore[arg-type]

    def each(self, dtype: torch.dtype) -> Iterator[ExpertWeights]:
        """Every expert's, in `dtype`. By unbind: the gradient of an index into a stack is as large as the stack."""
        parts = [repeat(None) if part is None else part.to(dtype).unbind() for part in self]
        return (ExpertWeights(*mine) for mine in zip(*parts, strict=False))


def split_hidden(spec: ActivationSpec, hidden: Tensor) -> tuple[Tensor, ...]:
    """The first product [..., 2f] or [..., f] as the arguments of `activate`: up and gate, or up alone."""
    return hidden.chunk(2, -1)[::-1] if spec.gated else (hidden,)


def grouped_experts(
    x: Tensor,
    scale: Tensor | None,
    indices: Tensor,
    weights: ExpertWeights,
    spec: ActivationSpec,
    recompute: bool = False,
) -> Tensor:
    """The weighted sum of the chosen experts' outputs.

    Args:
        x: [t, d]; its dtype is that of the arithmetic and of the result [t, d].
        scale: [t, c], the factor on each chosen expert's output; None: 1.
        indices: [t, c] int64, the chosen experts.
        recompute: take the first product again in the backward pass instead of keeping it.
    """
    dispatch = Dispatch.of(indices, weights.first.shape[0])
    settings = _Settings(spec, torch.is_grad_enabled() and not recompute, dispatch.bounds())
    with without_autocast(x.device):
        result: Tensor = _GroupedExperts.apply(x, scale, *weights, dispatch, settings)
    return result


class _Settings(NamedTuple):
    spec: ActivationSpec
    keep: bool
    """Whether the first product is kept for the backward pass."""
    bounds: list[int]
    """Where the rows of each expert start, and the number of rows."""

    def segments(self) -> list[tuple[int, slice]]:
        """The experts that have rows, each with its rows."""
        return [(expert, slice(*ends)) for expert, ends in enumerate(pairwise(self.bounds)) if ends[0] < ends[1]]

    def idle(self) -> list[int]:
        """The experts that have none."""
        return [expert for expert, (start, stop) in enumerate(pairwise(self.bounds)) if start == stop]

    def longest(self) -> int:
        """The most rows that an expert has."""
        return max(stop - start for start, stop in pairwise(self.bounds))


class _GroupedExperts(torch.autograd.Function):
    """Contiguous rows for every expert, products into memory that is taken once, sums without atomics.

    The outputs of the experts are not kept: the gradient of a scale is <activations, W_down^T grad>, both of which the
    backward pass has at hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        first: Tensor,
        down: Tensor,
        first_bias: Tensor | None,
        down_bias: Tensor | None,
        dispatch: Dispatch,
        settings: _Settings,
    ) -> Tensor:
        weights = ExpertWeights(first, down, first_bias, down_bias)
        num_rows, longest = dispatch.token.numel(), settings.longest()
        inputs = x.new_empty(longest, x.shape[1])
        hidden = x.new_empty(num_rows if settings.keep else longest, first.shape[1])
        outputs = x.new_empty(num_rows, down.shape[1])
        for expert, rows in settings.segments():
            mine = weights.of(expert, x.dtype)
            gathered = _gather(x, dispatch.token[rows], inputs)
            place = hidden[rows] if settings.keep else hidden[: len(gathered)]
            _product(gathered, mine.first, mine.first_bias, place)
            active = activate(settings.spec, *split_hidden(settings.spec, place))
            _product(active, mine.down, mine.down_bias, outputs[rows])
        ctx.settings = settings
        ctx.save_for_backward(x, scale, *weights, *dispatch, hidden if settings.keep else None)
        return sum_rows(outputs, dispatch.row, None if scale is None else scale.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: recomputed activations are handed out a single time
        with without_autocast(grad.device):
            work = _Backward(ctx, saved, grad)
            for expert, rows in ctx.settings.segments():
                work.run(expert, rows)
            return (*work.results(), None, None)


class _Backward:
    """The gradients of one call, filled expert by expert."""

    def __init__(self, ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> None:
        self.x, self.scale, *parts = saved[:6]
        self.dispatch = Dispatch(*saved[6:10])
        self.hidden = saved[10]
        self.weights, self.spec = ExpertWeights(*parts), ctx.settings.spec
        self.grad = grad.contiguous()
        needs_x, needs_scale, *needs_parts = ctx.needs_input_grad[:6]
        num_rows, longest = self.dispatch.token.numel(), ctx.settings.longest()
        self.x_rows = self.x.new_empty(num_rows, self.x.shape[1]) if needs_x else None
        wide = torch.promote_types(self.x.dtype, torch.float32)
        self.scale_rows = self.x.new_empty(num_rows, dtype=wide) if needs_scale else None
        self.parts = ExpertWeights(
            *(torch.empty_like(part) if needed else None for part, needed in zip(parts, needs_parts, strict=True))  # type: ignore[arg-type]
        )
        for part in self.parts:
            if part is not None:
                for expert in ctx.settings.idle():
                    part[expert].zero_()
        self.row_scale = None if self.scale is None else self.scale.flatten()[self.dispatch.order].to(self.x.dtype)
        self.inputs = self.x.new_empty(longest, self.x.shape[1])
        self.grads = self.x.new_empty(longest, self.grad.shape[1])

    def run(self, expert: int, rows: slice) -> None:
        mine, token = self.weights.of(expert, self.x.dtype), self.dispatch.token[rows]
        inputs, grads = _gather(self.x, token, self.inputs), _gather(self.grad, token, self.grads)
        active, pull_back = self._activate(inputs, mine, rows)
        active_grad = grads @ mine.down
        if self.scale_rows is not None:
            wide = self.scale_rows.dtype
            products = (active * active_grad).sum(-1, dtype=wide)
            if mine.down_bias is not None:
                products = products + grads.to(wide) @ mine.down_bias.to(wide)
            self.scale_rows[rows] = products
        if self.row_scale is not None:
            scale = self.row_scale[rows, None]
            grads.mul_(scale)
            active_grad.mul_(scale)
        hidden_grad = pull_back(active_grad)
        _sum_over_rows(grads, active, self.parts.down, expert)
        _sum_over_rows(grads, None, self.parts.down_bias, expert)
        _sum_over_rows(hidden_grad, inputs, self.parts.first, expert)
        _sum_over_rows(hidden_grad, None, self.parts.first_bias, expert)
        if self.x_rows is not None:
            torch.mm(hidden_grad, mine.first, out=self.x_rows[rows])

    def _activate(self, inputs: Tensor, mine: ExpertWeights, rows: slice) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The activations of an expert, and what takes their gradient to that of the first product."""
        if self.hidden is not None:
            hidden = self.hidden[rows]
        else:
            hidden = _product(inputs, mine.first, mine.first_bias, inputs.new_empty(len(inputs), len(mine.first)))
        with torch.enable_grad():
            halves = [half.detach().requires_grad_() for half in split_hidden(self.spec, hidden)]
            active = activate(self.spec, *halves)

        def pull_back(grad: Tensor) -> Tensor:
            found = torch.autograd.grad(active, halves, grad)
            return torch.cat(found[::-1], -1) if len(found) > 1 else found[0]

        return active.detach(), pull_back

    def results(self) -> tuple[Tensor | None, ...]:
        x = None if self.x_rows is None else sum_rows(self.x_rows, self.dispatch.row)
        scale = None if self.scale_rows is None else self.scale_rows[self.dispatch.row].to(self.scale.dtype)
        return (x, scale, *self.parts)


def _gather(x: Tensor, token: Tensor, buffer: Tensor) -> Tensor:
    """The rows of x [t, d] that `token` [m] names, in the first rows of `buffer` [at least m, d]."""
    return torch.index_select(x, 0, token, out=buffer[: len(token)])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """x [m, i] times weight [o, i] plus bias [o], into out [m, o]."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _sum_over_rows(grad: Tensor, factor: Tensor | None, stack: Tensor | None, expert: int) -> None:
    """Put the gradient of an expert's matrix, grad^T factor, or of its bias, in its place of `stack`."""
    if stack is None:
        return
    if factor is None:
        torch.sum(grad, 0, dtype=stack.dtype, out=stack[expert])
    elif stack.dtype == grad.dtype:
        torch.mm(grad.t(), factor, out=stack[expert])
    else:
        stack[expert].copy_(grad.t() @ factor)
