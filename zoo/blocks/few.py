"""Experts and matrices for a few tokens on a CPU: every weight that is needed is read once, at the speed of memory.

The products are taken in fp32, whatever the weights are stored in, by the kernels that decoding has.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from zoo.blocks.grouped import ExpertWeights
from zoo.native.calls import DTYPES, Program, expert_matrices, feed_call
from zoo.native.library import is_loaded, library
from zoo.spec.mlp import ActivationSpec

MOST_ROWS = 8
"""Tokens beyond which larger tiles are the faster ones."""


def is_few(x: Tensor, weights: ExpertWeights) -> bool:
    """Whether `few_experts` computes this and nobody needs a gradient, or watches what torch does."""
    parts = [part for part in weights if part is not None]
    return (
        len(x) <= MOST_ROWS
        and is_loaded()
        and not (torch.is_grad_enabled() and any(part.requires_grad for part in (x, *parts)))
        and all(part.device.type == "cpu" and part.is_contiguous() for part in (x, *parts))
        and x.dtype in DTYPES
        and all(part.dtype == weights.first.dtype and part.dtype in DTYPES for part in parts)
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
    )


def few_experts(
    x: Tensor, scale: Tensor | None, indices: Tensor, weights: ExpertWeights, spec: ActivationSpec
) -> Tensor:
    """The weighted sum of the chosen experts' outputs. Arguments and result as in `Experts.forward`."""
    kernels = library()
    assert kernels is not None
    given = x.to(torch.float32)
    factors = torch.ones(indices.shape) if scale is None else scale.to(torch.float32).contiguous()
    chosen = indices.contiguous()
    hidden = torch.empty(indices.numel(), weights.down.shape[2])
    y = torch.empty(len(x), weights.down.shape[1])
    program = Program(kernels)
    matrices = expert_matrices(weights.first, weights.down, weights.first_bias, weights.down_bias, spec.gated)
    program.call(feed_call(matrices, spec, given, factors, chosen, hidden, y))
    program.run()
    return y.to(x.dtype)
