"""Norms, matrices and MLPs as compiled calls."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.blocks.base import Linear
from zoo.blocks.mlp import MLP
from zoo.blocks.norm import Norm
from zoo.decoding.steps import Steps
from zoo.native import calls
from zoo.native.calls import AddCall, NormCall, ProductCall, feed_call, matrix, pointer


def norm_of(norm: Norm | None) -> tuple[calls.Norm, tuple[Tensor, ...]]:
    """The kernels' description of a norm (None: of none), and the tensors that it points to."""
    if norm is None:
        return calls.Norm(), ()
    weight = None if norm.weight is None else norm.weight.detach().to(torch.float32)
    if weight is not None and norm.spec.weight == "plus_one":
        weight = 1.0 + weight
    bias = None if norm.bias is None else norm.bias.detach().to(torch.float32)
    found = calls.Norm(calls.NORMS[norm.spec.type], norm.width, pointer(weight), pointer(bias), norm.spec.eps)
    return found, tuple(tensor for tensor in (weight, bias) if tensor is not None)


def norm(steps: Steps, module: Norm | None, x: Tensor) -> Tensor:
    """The norm of x [..., width]; x itself without a norm."""
    if module is None:
        return x
    described, kept = norm_of(module)
    y = steps.buffer(*x.shape)
    steps.call(NormCall(described, pointer(x), pointer(y), x.numel() // module.width), x, y, kept)
    return y


def add(
    steps: Steps, x: Tensor, branch: Tensor, scale: float = 1.0, factor: float = 1.0, opening: Tensor | None = None
) -> None:
    """x <- (x + scale * opening * branch) * factor: x and branch [b, d], opening [b, 1]."""
    addresses = (pointer(x), pointer(branch), pointer(opening))
    steps.call(AddCall(*addresses, scale, factor, *x.shape), x, branch, opening)


def product(
    steps: Steps, weight: Tensor, x: Tensor, bias: Tensor | None = None, squash: str = "none", wait: bool = True
) -> Tensor:
    """squash(x W^T + bias): x [b, d] -> [b, n]."""
    y = steps.buffer(len(x), len(weight))
    described = matrix(weight, bias)
    arguments = ProductCall(described, pointer(x), pointer(y), len(x), calls.SQUASHES[squash])
    steps.call(arguments, x, y, weight, bias, wait=wait)
    return y


def linear(steps: Steps, module: Linear, x: Tensor, squash: str = "none", wait: bool = True) -> Tensor:
    return product(steps, module.weight, x, module.bias, squash, wait)


def mlp(steps: Steps, block: MLP, x: Tensor) -> Tensor:
    d_ffn = block.up.weight.shape[0]
    y, hidden = steps.buffer(*x.shape), steps.buffer(len(x), d_ffn)
    gate = calls.Matrix() if block.gate is None else matrix(block.gate.weight, block.gate.bias)
    matrices = (gate, matrix(block.up.weight, block.up.bias), matrix(block.down.weight, block.down.bias))
    steps.call(feed_call(matrices, block.spec, x, None, None, hidden, y), block, x, hidden, y)
    return y
