"""Matrices with a trained difference of low rank beside them (LoRA, arXiv:2106.09685): W + scale * B A, W at rest.

A `Linear` or the stacked experts become an adapted one in place, and back: the weights that they had keep their names
and their memory. `lora_a` and `lora_b` stand beside `weight`, `gate_up_lora_a` and `gate_up_lora_b` beside `gate_up`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.activation import activate
from zoo.blocks.autocast import autocast_dtype, without_autocast
from zoo.blocks.base import Linear
from zoo.blocks.dispatch import Dispatch, combine, gather
from zoo.blocks.experts import Experts
from zoo.blocks.grouped import split_hidden


def difference(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * B A [..., out, in] of a [..., r, in] and b [..., out, r]."""
    return (b @ a).mul_(scale)


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The plain weight that does what the adapted one does, in its dtype; the sum is taken in fp32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + difference(a.to(wide), b.to(wide), scale)).to(weight.dtype)


class Adapted(nn.Module):
    """What is adapted in place: which of its weights have a difference, and how large that counts."""

    scale: float

    @staticmethod
    def names(weight: str) -> tuple[str, str]:
        """The names of A and B beside that of a weight of the module."""
        prefix = "" if weight == "weight" else f"{weight}_"
        return f"{prefix}lora_a", f"{prefix}lora_b"

    def factors(self, weight: str) -> tuple[Tensor, Tensor] | None:
        """A [..., r, in] and B [..., out, r] of a weight [..., out, in]; None where it is not adapted."""
        a, b = (getattr(self, name, None) for name in self.names(weight))
        return None if a is None or b is None else (a, b)


class AdaptedLinear(Linear, Adapted):
    """y = x W^T + b + scale * (x A^T) B^T."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        found = self.factors("weight")
        return y if found is None else y.add_(_through(x, *found, self.scale))

    def matrix(self) -> Tensor:
        found = self.factors("weight")
        return self.weight if found is None else merged(self.weight, *found, self.scale)


class AdaptedExperts(Experts, Adapted):
    """Stacked experts, each with an A and a B of its own: [e, r, in] and [e, out, r]."""

    def forward(self, x: Tensor, weights: Tensor | None, indices: Tensor) -> Tensor:
        """As `Experts.forward`. The experts that have tokens are gone through one by one."""
        x = x.to(autocast_dtype(x))
        dispatch = Dispatch.of(indices, len(self.down))
        bounds = dispatch.bounds()
        with without_autocast(x.device):
            rows = gather(x, dispatch)
            first = self._product(self._first, x.dtype)
            down = self._product("down", x.dtype)
            outputs = [
                down(expert, activate(self.spec, *split_hidden(self.spec, first(expert, rows[start:stop]))))
                for expert, (start, stop) in enumerate(pairwise(bounds))
                if start < stop
            ]
            return combine(torch.cat(outputs) if outputs else rows, weights, dispatch)

    def _product(self, name: str, dtype: torch.dtype) -> Callable[[int, Tensor], Tensor]:
        """From an expert and its rows [n, in] to their product [n, out] with its matrix of the stack `name`."""
        stack, bias, found = getattr(self, name), getattr(self, f"{name}_bias", None), self.factors(name)
        # By unbind: the gradient of an index into a stack is as large as the stack.
        parts = None if found is None else [part.to(dtype).unbind() for part in found]

        def product(expert: int, rows: Tensor) -> Tensor:
            y = F.linear(rows, stack[expert].to(dtype), None if bias is None else bias[expert].to(dtype))
            return y if parts is None else y.add_(_through(rows, parts[0][expert], parts[1][expert], self.scale))

        return product


def _through(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * (x A^T) B^T of x [..., in] in the dtype of x; the small product takes the factor."""
    return F.linear(F.linear(x, a.to(x.dtype)) * scale, b.to(x.dtype))


_ADAPTED: dict[type[nn.Module], type[nn.Module]] = {Linear: AdaptedLinear, Experts: AdaptedExperts}


def weights_of(module: nn.Module) -> tuple[str, ...]:
    """The weights of a module that can be adapted: matrices [out, in] and stacks [e, out, in]; of none, nothing."""
    if type(module) in (Linear, AdaptedLinear):
        return ("weight",)
    if isinstance(module, Experts):
        return (module._first, "down")
    return ()


@torch.no_grad()
def attach(module: nn.Module, weight: str, rank: int, scale: float) -> None:
    """Adapt a weight in place. B is zero, so that nothing changes at first; A is drawn from torch's generator.

    Both are fp32 at least: small steps would be lost in bf16.
    """
    if not isinstance(module, Adapted):
        module.__class__ = _ADAPTED[type(module)]
    assert isinstance(module, Adapted)
    module.scale = scale
    stack = getattr(module, weight)
    *experts, d_out, d_in = stack.shape
    dtype = torch.promote_types(stack.dtype, torch.float32)
    a = torch.empty(*experts, rank, d_in, dtype=dtype, device=stack.device)
    b = torch.zeros(*experts, d_out, rank, dtype=dtype, device=stack.device)
    bound = d_in**-0.5
    a.uniform_(-bound, bound)
    for name, value in zip(module.names(weight), (a, b), strict=True):
        module.register_parameter(name, nn.Parameter(value))


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """Put the differences into the plain weights and take the module back to what it was before."""
    assert isinstance(module, Adapted)
    for weight in weights_of(module):
        found = module.factors(weight)
        if found is None:
            continue
        plain = getattr(module, weight)
        if plain.ndim == 2:
            plain.copy_(merged(plain, *found, module.scale))
        else:  # one at a time, so that no second stack is made
            for expert, matrix in enumerate(plain):
                matrix.copy_(merged(matrix, found[0][expert], found[1][expert], module.scale))
        for name in module.names(weight):
            delattr(module, name)
    module.__class__ = {after: before for before, after in _ADAPTED.items()}[type(module)]  # type: ignore[assignment]
