"""Norms over the last axis."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.compiled_mixers import fits
from zoo.blocks.compiled_trunk import RMSNorm
from zoo.blocks.sparing import sparing
from zoo.spec.norm import NormSpec


class Norm(nn.Module):
    """RMS norm (arXiv:1910.07467) or layer norm (arXiv:1607.06450) with the weight conventions of `NormSpec`.

    The root mean square is computed in fp32 whatever the dtype of x, as released models do; a layer norm is computed as
    torch does it, in fp32 at least.
    """

    def __init__(self, width: int, spec: NormSpec | None = None) -> None:
        super().__init__()
        self.width = width
        self.spec = spec or NormSpec()
        self.weight = nn.Parameter(torch.empty(width)) if self.spec.weight != "none" else None
        self.bias = nn.Parameter(torch.empty(width)) if self.spec.bias else None
        self.init_weights(std=0.0, out_std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width]; the result has its shape and dtype."""
        spec = self.spec
        weight: Tensor | None = self.weight
        if weight is not None and spec.weight == "plus_one":
            weight = 1.0 + weight.to(torch.float32)
        if spec.type == "layer":
            weight = None if weight is None else weight.to(x.dtype)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.layer_norm(x, (self.width,), weight, bias, spec.eps)
        if fits(x, weight):
            y: Tensor = RMSNorm.apply(x, weight, spec.eps)
            return y
        if x.dtype == torch.float32:
            return F.rms_norm(x, (self.width,), weight, spec.eps)
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + spec.eps)
        if weight is None:
            return wide.to(x.dtype)
        if spec.weight == "plain":
            return wide.to(x.dtype) * weight.to(x.dtype)
        return (wide * (weight if spec.weight == "wide" else weight.to(torch.float32))).to(x.dtype)

    def spared(self, x: Tensor, y: Tensor, wanted: bool) -> AbstractContextManager[None]:
        """Within, what keeps y, which is this norm of x, keeps nothing: it is made again from x, if it is `wanted`."""
        if not wanted or self.spec.type != "rms" or not torch.is_grad_enabled() or not fits(x, y, self.weight):
            return nullcontext()
        given = x.detach()
        return sparing((y, lambda: self.forward(given)))

    def init_weights(self, std: float, out_std: float) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.spec.weight == "plus_one" else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
