"""One stage of a pipeline: some of the layers of a model.

What a process needs beside its layers it finds out by itself: it has the tokens of its rows, and what its layers add to
the objective enters its own backward pass, so that nothing but the residual stream travels.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.blocks.base import Context
from zoo.decoder import Decoder
from zoo.parallel.mesh import World
from zoo.train.trainer import Autocast, MakeContext


class Absent(nn.Module):
    """Stands for a part of a model that other processes have."""

    weight: None = None

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """x."""
        return x


class Stage(nn.Module):
    """Consecutive layers of a model, with the embedding before the first of all and the objective after the last.

    Its parts are those of the model, not copies of them.
    """

    def __init__(self, model: Decoder, layers: range, index: int, num_stages: int, world: World) -> None:
        super().__init__()
        self.index, self.is_first, self.is_last = index, index == 0, index == num_stages - 1
        self.layers = nn.ModuleList(model.layers[layer] for layer in layers)
        if self.is_first or self.is_last:
            self.embed = model.embed
        if self.is_last:
            self.norm, self.head, self.mtp = model.norm, model.head, model.mtp
        self.world = world
        self._model = (model,)  # not a part of this module
        self.autocast: Autocast = nullcontext
        self.make_context: MakeContext = Context.of
        self.weight: Tensor | float = 1.0
        """Of the next micro-batch in the mean over all."""
        self.total: Tensor | float = 0.0
        self.sums: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()
        """Of the parts that make each of `sums`."""

    def begin(self, autocast: Autocast, make_context: MakeContext) -> None:
        """Before the micro-batches of a step."""
        self.autocast, self.make_context = autocast, make_context
        self.total, self.sums, self.counts = 0.0, {}, Counter()

    def forward(self, x: Tensor, *, tokens: Tensor, targets: Tensor) -> Tensor:
        """The residual stream after these layers, or the objective of this micro-batch times its weight.

        Args:
            x: the residual stream before these layers; for the first stage the tokens.
            tokens, targets: [b, s] int64.
        """
        context = self.make_context(tokens)
        context.peers = self.world
        with self.autocast():
            return self._forward(x, tokens, targets, context)

    def _forward(self, x: Tensor, tokens: Tensor, targets: Tensor, context: Context) -> Tensor:
        (model,) = self._model
        x = self.embed(tokens, context) if self.is_first else x
        for layer in self.layers:
            x = model.pass_layer(layer, x, context)
        if not self.is_last:
            terms = self._note(context)
            return x if terms is None else _WithTerms.apply(x, terms * self.weight)
        losses = model.objective(self.norm(x), tokens, targets, context)
        self._note(context)
        self._add("cross_entropy", [losses.items["cross_entropy"]])
        self.total = self.total + losses.total.detach() * self.weight
        return losses.total * self.weight

    def _note(self, context: Context) -> Tensor | None:
        """Keep what the layers recorded; its share of the objective, None when there is none."""
        terms: list[Tensor] = []
        for name, values in context.losses.items():
            self._add(name, values)
            terms += [factor * value for factor, value in zip(context.coefficients[name], values, strict=True)]
        if self.is_last or not terms:
            return None
        total = torch.stack(terms).sum()
        self.total = self.total + total.detach() * self.weight
        return total

    def _add(self, name: str, values: list[Tensor]) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + torch.stack(values).sum().detach() * self.weight
        self.counts[name] = len(values)


class _WithTerms(torch.autograd.Function):
    """x; a backward pass through it is one of a sum of terms, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, terms: Tensor) -> Tensor:
        ctx.like = terms.new_ones(())
        return x.clone()  # no view of it: `fully_shard` hangs its hooks on what a stage returns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, ctx.like
