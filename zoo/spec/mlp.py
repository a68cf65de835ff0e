"""The dense channel mixer and the activations that it shares with experts."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from zoo.spec.base import Spec, problem, register_spec
from zoo.spec.block import FFNSpec, scaled

Activation = Literal[
    "silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swish", "clamped_silu", "silu_clamped", "situ"
]
_NEEDS_LIMIT = ("clamped_swish", "clamped_silu", "silu_clamped")
_GATED_ONLY = (*_NEEDS_LIMIT, "situ")


class ActivationSpec(Spec):
    """The nonlinearity of an MLP or expert. Gated: f(gate) * up, three matrices; ungated: f(up), two.

    `clamped_swish` (gate <= L, |up| <= L): (up + 1) * gate * sigmoid(1.702 * gate).
    `clamped_silu` (gate <= L, |up| <= L): silu(gate) * up. `silu_clamped`: min(silu(gate), L) * clamp(up, -L, L).
    `situ`: 4 tanh(gate / 4) sigmoid(gate) * 25 tanh(up / 25). `relu2`: the square of relu.
    """

    activation: Activation = "silu"
    activation_limit: PositiveFloat | None = None
    """L above; given exactly for the clamped activations."""
    gated: bool = True
    bias: bool = False

    @model_validator(mode="after")
    def _check_activation(self) -> ActivationSpec:
        if (self.activation in _NEEDS_LIMIT) != (self.activation_limit is not None):
            raise problem("activation_limit", self.activation_limit, f"give it exactly for {', '.join(_NEEDS_LIMIT)}")
        if self.activation in _GATED_ONLY and not self.gated:
            raise problem("gated", False, f"must be true for {self.activation}")
        return self


@register_spec
class MLPSpec(ActivationSpec, FFNSpec):
    """Two or three matrices around an activation (gated: arXiv:2002.05202)."""

    type: Literal["mlp"] = "mlp"
    d_ffn: PositiveInt

    def shrunk(self, d_model: int) -> MLPSpec:
        """The width in proportion."""
        return self.replace(d_ffn=scaled(self.d_ffn, d_model))
