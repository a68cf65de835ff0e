"""One stage of a pipeline by itself: what arrives from its neighbours comes out of nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.blocks.base import Context
from zoo.blocks.linear_loss import IGNORED
from zoo.decoder import Decoder, Losses
from zoo.parallel.stage import Absent
from zoo.plan.layout import Layout
from zoo.plan.stages import layers_of_pieces


def layers_of(num_layers: int, layout: Layout, stage: int) -> list[int]:
    """The layers of a stage, in the order in which they are passed."""
    pieces = layers_of_pieces(num_layers, layout.pp * layout.vp)
    return [layer for index in range(stage, len(pieces), layout.pp) for layer in pieces[index]]


def in_flight(layout: Layout, stage: int, num_micro_batches: int) -> int:
    """Micro-batches that a stage has passed forward and not yet back, at most: 1F1B, or interleaved (arXiv:2104.04473),
    whose parts of a stage are rounded up to whole ones."""
    most = layout.pp - stage
    if layout.vp > 1:
        most = -(-(2 * (layout.pp - stage - 1) + (layout.vp - 1) * layout.pp + 1) // layout.vp)
    return max(1, min(most, num_micro_batches))


def sends(layout: Layout, stage: int) -> int:
    """How often a stage sends the residual stream of a micro-batch, or its gradient."""
    return 2 * layout.vp - (stage == 0) - (stage == layout.pp - 1)


def order(num_micro_batches: int, flight: int) -> Iterator[tuple[str, int]]:
    """Passes of a stage one after the other: `forward` or `backward`, and of which micro-batch."""
    yield from (("forward", index) for index in range(flight))
    for index in range(num_micro_batches):
        yield "backward", index
        if index + flight < num_micro_batches:
            yield "forward", index + flight


def cut_ends(model: Decoder, layout: Layout, stage: int, dtype: torch.dtype) -> None:
    """Take away from `model` the ends that other stages have."""
    if stage > 0:
        model.embed = cast(Any, _Arriving(model.spec.d_model, layout.tp * layout.cp, dtype))
    if stage < layout.pp - 1:
        model.norm, model.head, model.mtp = cast(Any, Absent()), cast(Any, Absent()), None
        model.objective = _leaving  # type: ignore[method-assign]


class _Arriving(Absent):
    """The residual stream of the stage before, in the place of an embedding."""

    def __init__(self, d_model: int, parts: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.d_model, self.parts, self.dtype = d_model, parts, dtype

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """tokens [b, s] -> [b, s / parts, d]."""
        shape = (x.shape[0], x.shape[1] // self.parts, self.d_model)
        return torch.empty(shape, dtype=self.dtype, device=x.device, requires_grad=True)


def _leaving(hidden: Tensor, tokens: Tensor, targets: Tensor, context: Context) -> Losses:
    """What stands for the objective where the residual stream goes on to the next stage."""
    del tokens
    total = _Leaving.apply(hidden)
    items = {"cross_entropy": total.detach()}
    for name, values in context.losses.items():
        for value, coefficient in zip(values, context.coefficients[name], strict=True):
            total = total + coefficient * value
        items[name] = torch.stack(values).mean().detach()
    return Losses(total, items, (targets != IGNORED).sum())


class _Leaving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.new_empty(ctx.shape, dtype=ctx.dtype)
