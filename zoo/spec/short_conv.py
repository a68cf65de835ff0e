"""The gated short convolution."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import PositiveInt

from zoo.spec.base import register_spec
from zoo.spec.block import MixerSpec


@register_spec
class ShortConvSpec(MixerSpec):
    """out(c * conv(b * v)): b, c and v are projections of the input, conv is causal and as wide as a few tokens."""

    type: Literal["short_conv"] = "short_conv"
    width: PositiveInt = 3
    """Tokens that the convolution sees, the newest included."""
    bias: bool = False
    """On the projections and the convolution."""

    def shrunk(self, d_model: int) -> Self:
        """Itself: it has no width of its own."""
        del d_model
        return self
