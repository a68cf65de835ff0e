"""The gated delta rule: linear attention that overwrites what it remembers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import NegativeFloat, PositiveFloat, PositiveInt, model_validator

from zoo.spec.base import Spec, problem, register_spec
from zoo.spec.block import TINY_D_MODEL, MixerSpec


class DecaySpec(Spec):
    """How fast the state of a head fades, from the block's input x. Every step multiplies it with exp(log decay)."""

    per: Literal["head", "channel"] = "head"
    """One factor for each head (arXiv:2412.06464), or one for each of its key channels (arXiv:2510.26692)."""
    rank: PositiveInt | None = None
    """Inner width of the projection of x; absent: one full matrix."""
    lower_bound: NegativeFloat | None = None
    """Absent: the log decay is -exp(a_log) * softplus(W x + dt_bias), without bound.
    Given: lower_bound * sigmoid(exp(a_log) * (W x + dt_bias)), never below it."""


@register_spec
class DeltaSpec(MixerSpec):
    """The gated delta rule (arXiv:2412.06464) with the options of released models.

    A head keeps a matrix S of head_dim x v_head_dim: S <- exp(log decay) S; S <- S + beta k (v - S^T k)^T. Its output
    is S^T q, normed and gated. Queries, keys and values pass a short convolution with silu first; queries and keys are
    then divided by their length.
    """

    type: Literal["delta"] = "delta"
    num_heads: PositiveInt
    """Value heads: each has a state of its own."""
    num_qk_heads: PositiveInt | None = None
    """Heads of queries and keys, each shared by num_heads / num_qk_heads value heads; absent: num_heads."""
    head_dim: PositiveInt
    """Channels of a query or key head."""
    v_head_dim: PositiveInt | None = None
    """Channels of a value head; absent: head_dim."""
    conv_width: PositiveInt = 4
    """Tokens that the convolution sees, the newest included."""
    decay: DecaySpec = DecaySpec()
    beta_scale: PositiveFloat = 1.0
    """beta = beta_scale * sigmoid(w x); 2 lets eigenvalues of a step be negative (arXiv:2411.12537)."""
    gate_activation: Literal["silu", "sigmoid"] = "silu"
    """Of the output gate, which multiplies the normed output."""
    gate_rank: PositiveInt | None = None
    """Inner width of the gate's projection; absent: one full matrix."""
    norm_weight: Literal["plain", "fp32"] = "plain"
    """Of the norm of each value head. `plain`: cast back, then times w. `fp32`: w and gate in fp32, then cast."""
    norm_eps: PositiveFloat | None = None
    """Of that norm; absent: the eps of the model's norm."""
    chunk_size: PositiveInt = 64
    """Tokens that are worked on as one matrix when many are at hand, a power of two. It changes speed, not results."""

    @property
    def qk_heads(self) -> int:
        """Heads of queries and keys."""
        return self.num_qk_heads or self.num_heads

    @property
    def v_width(self) -> int:
        """Channels of a value head."""
        return self.v_head_dim or self.head_dim

    @property
    def decay_width(self) -> int:
        """Log decays of a token."""
        return self.num_heads * (self.head_dim if self.decay.per == "channel" else 1)

    @model_validator(mode="after")
    def _check(self) -> DeltaSpec:
        if self.num_heads % self.qk_heads:
            raise problem("num_qk_heads", self.num_qk_heads, f"must divide num_heads ({self.num_heads})")
        if self.beta_scale > 2:
            raise problem("beta_scale", self.beta_scale, "must be at most 2: the state grows without bound above")
        if self.chunk_size & (self.chunk_size - 1):
            raise problem("chunk_size", self.chunk_size, "must be a power of two")
        return self

    def shrunk(self, d_model: int) -> DeltaSpec:
        """Four heads of 16 channels; shared key heads stay shared, own value widths stay apart, low ranks stay low."""
        del d_model
        changes: dict[str, Any] = {
            "num_heads": 4,
            "num_qk_heads": self.num_qk_heads and (4 if self.num_qk_heads == self.num_heads else 2),
            "head_dim": TINY_D_MODEL // 4,
            "v_head_dim": self.v_head_dim and (TINY_D_MODEL // 4 if self.v_head_dim == self.head_dim else 24),
            "decay": self.decay.replace(rank=self.decay.rank and 8),
            "gate_rank": self.gate_rank and 8,
        }
        return self.replace(**changes)
