"""What every cost has in common: the weights of a block and the FLOPs of one token in it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

from zoo.plan.tape import Tape, Value
from zoo.spec.base import mirrored
from zoo.spec.block import BlockSpec
from zoo.spec.norm import NormSpec


@dataclass(frozen=True)
class Weight:
    """One trained tensor."""

    name: str
    """Its path below the block, as in the module's `named_parameters()`."""
    shape: tuple[int, ...]
    product: bool = False
    """Activations are multiplied with it, once a token; vectors that are added or scaled with are no products."""
    share: Fraction = Fraction(1)
    """The part of it that one token touches: top_k / num_experts for stacked experts."""
    part: str = ""
    """The row below its block in a table of costs; empty: the block's own row."""

    @property
    def size(self) -> int:
        """Its number of parameters."""
        return math.prod(self.shape)

    @property
    def active(self) -> int:
        """How many of its parameters one token touches."""
        return int(self.size * self.share)

    @property
    def flops(self) -> int:
        """Forward FLOPs of one token; a multiply-add counts 2."""
        return 2 * self.active if self.product else 0

    def under(self, prefix: str, part: str | None = None) -> Weight:
        """The same tensor seen from outside of the submodule `prefix`, in another `part` if one is given."""
        return replace(self, name=f"{prefix}.{self.name}", part=self.part if part is None else part)


def linear(name: str, d_in: int, d_out: int, bias: bool = False, part: str = "") -> list[Weight]:
    """The weights of a `Linear`: weight [d_out, d_in], bias [d_out]."""
    weights = [Weight(f"{name}.weight", (d_out, d_in), product=True, part=part)]
    return [*weights, Weight(f"{name}.bias", (d_out,), part=part)] if bias else weights


class Cost:
    """The cost of a block. Subclasses name the spec that they price and stand in the mirrored module of `zoo.plan`."""

    prices: ClassVar[type[BlockSpec]]

    def __init__(self, spec: Any, d_model: int, norm: NormSpec) -> None:
        self.spec = spec.resolved(d_model)
        self.d_model = d_model
        self.norm = norm

    def weights(self) -> list[Weight]:
        """Every trained tensor. Buffers (correction biases) are not trained."""
        raise NotImplementedError

    def mixing(self, seq_len: int, skip_masked: bool) -> dict[str, float]:
        """Forward FLOPs of one token by part in products of activations with each other, such as attention's scores.

        Args:
            seq_len: the tokens of the sequence, over which the count is averaged.
            skip_masked: count only the pairs of tokens that a mask leaves; False: all pairs.
        """
        del seq_len, skip_masked
        return {}

    def activations(self) -> dict[str, float]:
        """Elements that one token keeps for the backward pass, by what they are.

        What goes into a product with a weight is kept, and so is what comes out, to go into the next operation. What
        comes from the residual stream is kept once before its norm and once after (`inputs`). `hidden`: what goes into
        the last product of an MLP. `routed`: copies of the token, one for each expert that it is sent to; `experts`:
        what all of these keep inside.
        """
        kept = {"inputs": 2.0 * self.d_model, "inner": 0.0, "hidden": 0.0, "routed": 0.0, "experts": 0.0}
        for weight in self.weights():
            if not weight.product or len(weight.shape) < 2:
                continue
            rows, columns = weight.shape[-2:]
            down = "down" in weight.name and rows == self.d_model
            writes = down or weight.name.split(".")[0] in ("out", "latent_up")
            if len(weight.shape) == 3:
                choices = float(weight.share * weight.shape[0])
                kept["routed"] += 0 if "down" in weight.name else choices * columns
                kept["experts"] += choices * (columns if "down" in weight.name else rows)
            elif writes:
                kept["hidden" if down else "inner"] += columns
            else:
                kept["inner"] += rows + (columns if columns != self.d_model else 0)
        return kept

    def forward(self, tape: Tape, x: Value) -> Value:
        """Tell `tape` what the module's forward pass does with memory: x [b, s, d_model] in, the same out."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its forward pass keeps")

    def cache(self, num_tokens: int) -> dict[str, float]:
        """Elements that a sequence of `num_tokens` leaves behind for the tokens after it, by what they are.

        `state` is kept in fp32, whatever the dtype of the rest. Channel mixers leave nothing.
        """
        del num_tokens
        return {}

    def flops(self, seq_len: int, skip_masked: bool = True) -> dict[str, float]:
        """Forward FLOPs of one token by part: the products with weights, then those of `mixing`."""
        parts: dict[str, float] = {}
        for weight in self.weights():
            parts[weight.part] = parts.get(weight.part, 0) + weight.flops
        for part, flops in self.mixing(seq_len, skip_masked).items():
            parts[part] = parts.get(part, 0) + flops
        return {part: flops for part, flops in parts.items() if flops}


def cost_of(spec: BlockSpec, d_model: int, norm: NormSpec) -> Cost:
    """The cost of a described block."""
    cost: type[Cost] = mirrored(type(spec), "plan", Cost, lambda found: getattr(found, "prices", None))
    return cost(spec, d_model, norm)
