"""Mamba-1: a state-space model whose state fades by a factor for each of its entries."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveInt

from zoo.spec.base import register_spec
from zoo.spec.block import TINY_D_MODEL, MixerSpec


@register_spec
class Mamba1Spec(MixerSpec):
    """Mamba-1 (arXiv:2312.00752) with the options of released models.

    A channel keeps a vector h of d_state: h <- exp(dt a) h + dt x b; its output is (h c + skip x) silu(z). x and z are
    projections of the block's input, x passes a short convolution and silu; b, c and, through a low rank, dt are
    projections of x.
    """

    type: Literal["mamba1"] = "mamba1"
    d_inner: PositiveInt | None = None
    """Channels; absent: 2 * d_model."""
    d_state: PositiveInt = 16
    """Entries of a channel's state: the width of b and c."""
    dt_rank: PositiveInt | None = None
    """Inner width of the projection to dt; absent: d_model / 16, rounded up."""
    conv_width: PositiveInt = 4
    """Tokens that the convolution sees, the newest included."""
    conv_bias: bool = True
    bias: bool = False
    """On the projections to and from the block."""
    inner_norms: bool = False
    """RMS norms of b, c and the low rank of dt, with the model's kind of weight (arXiv:2403.19887)."""

    def resolved(self, d_model: int) -> Mamba1Spec:
        changes = {"d_inner": self.d_inner or 2 * d_model, "dt_rank": self.dt_rank or -(-d_model // 16)}
        return self.replace(**changes)

    def shrunk(self, d_model: int) -> Mamba1Spec:
        """Twice as many channels as the twin is wide, with a state of 8; a low rank of 4."""
        del d_model
        changes: dict[str, Any] = {"d_inner": 2 * TINY_D_MODEL, "d_state": 8, "dt_rank": 4}
        return self.replace(**changes)
