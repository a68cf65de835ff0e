"""Mamba-2: a state-space model whose state fades by one factor a head."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from zoo.spec.base import problem, register_spec
from zoo.spec.block import MixerSpec


@register_spec
class Mamba2Spec(MixerSpec):
    """Mamba-2 (arXiv:2405.21060) with the options of released models.

    A head keeps a matrix S of head_dim x d_state: S <- exp(dt a) S + dt x b^T; its output is S c + skip x, gated and
    normed. Its step dt is softplus(w u + dt_bias) of the block's input u; x, b and c are projections of u that pass a
    short convolution and silu first.
    """

    type: Literal["mamba2"] = "mamba2"
    num_heads: PositiveInt
    head_dim: PositiveInt = 64
    """Channels of a head."""
    num_groups: PositiveInt = 1
    """Groups of heads that share b and c."""
    d_state: PositiveInt = 128
    """Channels of the state: the width of b and c."""
    conv_width: PositiveInt = 4
    """Tokens that the convolution sees, the newest included."""
    conv_bias: bool = True
    bias: bool = False
    """On the projections to and from the block."""
    dt_min: NonNegativeFloat | None = None
    """Steps are at least this; absent: no bound, as the released models were trained. transformers bounds the steps of
    some of them by 0.001 in its chunked form (and not in its step of one token): here a bound holds in both forms."""
    dt_max: PositiveFloat | None = None
    """Steps are at most this; absent: no bound."""
    norm_span: Literal["group", "full"] = "group"
    """The norm of the output is taken over each group of heads, or over all heads together."""
    norm_before_gate: bool = False
    """The output is normed, then gated, and not the other way round."""
    chunk_size: PositiveInt = 128
    """Tokens that are worked on as one matrix when many are at hand. It changes speed, not results."""

    @property
    def d_inner(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim

    @property
    def d_conv(self) -> int:
        """Channels of the convolution: x, b and c."""
        return self.d_inner + 2 * self.num_groups * self.d_state

    @model_validator(mode="after")
    def _check(self) -> Mamba2Spec:
        if self.num_heads % self.num_groups:
            raise problem("num_groups", self.num_groups, f"must divide num_heads ({self.num_heads})")
        if self.dt_max is not None and self.dt_max <= (self.dt_min or 0.0):
            raise problem("dt_max", self.dt_max, f"must be above dt_min ({self.dt_min})")
        return self

    def shrunk(self, d_model: int) -> Mamba2Spec:
        """Eight heads of 16 channels with a state of 16; shared groups stay shared."""
        del d_model
        groups = {1: 1, self.num_heads: 8}.get(self.num_groups, 2)
        return self.replace(num_heads=8, head_dim=16, num_groups=groups, d_state=16, chunk_size=16)
