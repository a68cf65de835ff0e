"""The cost of the dense channel mixer."""

from __future__ import annotations

from zoo.plan.base import Cost, Weight, linear
from zoo.plan.operations import activated, projected
from zoo.plan.tape import Tape, Value
from zoo.spec.mlp import MLPSpec


def mlp_weights(d_model: int, d_ffn: int, gated: bool, bias: bool) -> list[Weight]:
    """The weights of an MLP of width `d_ffn`: gate (if gated) and up [d_ffn, d_model], down [d_model, d_ffn]."""
    gate = linear("gate", d_model, d_ffn, bias) if gated else []
    return [*gate, *linear("up", d_model, d_ffn, bias), *linear("down", d_ffn, d_model, bias)]


class MLPCost(Cost):
    """Two or three matrices, each used once a token."""

    prices = MLPSpec
    spec: MLPSpec

    def weights(self) -> list[Weight]:
        return mlp_weights(self.d_model, self.spec.d_ffn, self.spec.gated, self.spec.bias)

    def forward(self, tape: Tape, x: Value) -> Value:
        spec = self.spec
        gate = projected(tape, x, self.d_model, spec.d_ffn, spec.bias) if spec.gated else None
        up = projected(tape, x, self.d_model, spec.d_ffn, spec.bias)
        hidden = activated(tape, spec, up, gate)
        if spec.activation == "silu" and gate is not None:
            tape.spare(hidden)
        return projected(tape, hidden, spec.d_ffn, self.d_model, spec.bias)
