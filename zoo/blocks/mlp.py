"""The dense channel mixer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.blocks.activation import activate, is_swiglu
from zoo.blocks.base import Block, Context, Linear
from zoo.blocks.compiled_trunk import swiglu
from zoo.blocks.sparing import sparing
from zoo.spec.mlp import MLPSpec


class MLP(Block):
    """Two or three matrices around an activation.

    `MLP(512, d_ffn=2048)(x)` maps x [..., 512] to the same shape.
    """

    describes = MLPSpec
    spec: MLPSpec

    def __init__(self, d_model: int, spec: MLPSpec | None = None, **options: Any) -> None:
        super().__init__(d_model, spec, **options)
        d_ffn, bias = self.spec.d_ffn, self.spec.bias
        self.gate = Linear(d_model, d_ffn, bias) if self.spec.gated else None
        self.up = Linear(d_model, d_ffn, bias)
        self.down = Linear(d_ffn, d_model, bias, writes_residual=True)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [..., d_model]; the result has its shape."""
        gate, up = self.gate(x) if self.gate is not None else None, self.up(x)
        hidden = activate(self.spec, up, gate)
        if gate is None or context is None or not context.sparing or not is_swiglu(self.spec, up, gate):
            return self.down(hidden)
        given = gate.detach(), up.detach()
        with sparing((hidden, lambda: swiglu(*given))):
            return self.down(hidden)
