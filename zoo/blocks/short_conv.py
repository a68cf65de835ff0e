"""The gated short convolution as a sequence mixer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.blocks.base import Context, Linear, Mixer
from zoo.blocks.conv import CausalConv, ConvState
from zoo.spec.short_conv import ShortConvSpec


class ShortConv(Mixer):
    """out(c * conv(b * v)) with b, c, v = b(x), c(x), v(x): a convolution between two gates, without an activation.

    `ShortConv(512, width=3)(x)` maps x [b, s, 512] to the same shape.
    """

    describes = ShortConvSpec
    spec: ShortConvSpec

    def __init__(self, d_model: int, spec: ShortConvSpec | None = None, **options: Any) -> None:
        super().__init__(d_model, spec, **options)
        bias = self.spec.bias
        self.b, self.c, self.v = (Linear(d_model, d_model, bias) for _ in range(3))
        self.conv = CausalConv(d_model, self.spec.width, bias, activation="none")
        self.out = Linear(d_model, d_model, bias, writes_residual=True)

    def forward(self, x: Tensor, context: Context | None = None, state: ConvState | None = None) -> Tensor:
        """x [b, s, d_model]; the result has its shape. `state`, from `new_state`, is continued without gradients.

        Raises:
            ValueError: documents together with a state.
        """
        return self.out(self.c(x) * self.conv(self.b(x) * self.v(x), context, state))

    def new_state(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> ConvState:
        return self.conv.new_state(batch_size, device, dtype)
