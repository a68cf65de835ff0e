"""Rotary position embeddings and their context-length scalings."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from zoo.spec.base import Items, Spec, TypedSpec, choice_of, problem, register_spec

TINY_CONTEXT = 64
"""`original_context` of tiny twins: short, so that scalings act."""


class RopeScaling(TypedSpec):
    """A rule that changes the rotary frequencies to reach beyond the length of pre-training."""

    def shrunk(self, rotary_dim: int) -> Self:
        """The same rule for a tiny twin."""
        del rotary_dim
        short = "original_context" in type(self).model_fields
        return self.replace(original_context=TINY_CONTEXT) if short else self


@register_spec
class LinearScaling(RopeScaling):
    """All frequencies divided by `factor` (position interpolation)."""

    type: Literal["linear"] = "linear"
    factor: PositiveFloat


@register_spec
class DynamicScaling(RopeScaling):
    """NTK-aware base that grows with the sequence once it is longer than `original_context`."""

    type: Literal["dynamic"] = "dynamic"
    factor: PositiveFloat
    original_context: PositiveInt


@register_spec
class NtkAlphaScaling(RopeScaling):
    """Static NTK: base times alpha^(d / (d - 2))."""

    type: Literal["ntk_alpha"] = "ntk_alpha"
    alpha: PositiveFloat


@register_spec
class BandsScaling(RopeScaling):
    """Wavelength bands: short waves kept, long ones divided by `factor`, a blend between."""

    type: Literal["bands"] = "bands"
    factor: PositiveFloat
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_context: PositiveInt


@register_spec
class YarnScaling(RopeScaling):
    """YaRN (arXiv:2309.00071): a ramp between kept and divided frequencies, and a temperature on cos and sin."""

    type: Literal["yarn"] = "yarn"
    factor: PositiveFloat
    original_context: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    truncate: bool = True
    """Round the ramp's ends to whole channels."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    """Replaces the temperature that follows from `factor` and the two mscales."""


@register_spec
class LongRopeScaling(RopeScaling):
    """LongRoPE (arXiv:2402.13753): a factor per channel, one list up to `original_context`, one beyond it."""

    type: Literal["longrope"] = "longrope"
    short_factor: Items[float]
    long_factor: Items[float]
    original_context: PositiveInt
    factor: PositiveFloat
    """Longest context over `original_context`; sets the temperature sqrt(1 + ln f / ln original_context)."""
    attention_factor: float | None = None
    short_attention_factor: float | None = None
    """Temperature up to `original_context` where it differs from the one beyond it."""

    def shrunk(self, rotary_dim: int) -> Self:
        """Lists of the right length, taken evenly from the whole ones."""

        def fewer(factors: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(factors[index * len(factors) // (rotary_dim // 2)] for index in range(rotary_dim // 2))

        short, long = fewer(self.short_factor), fewer(self.long_factor)
        return self.replace(short_factor=short, long_factor=long, original_context=TINY_CONTEXT)


@register_spec
class ProportionalScaling(RopeScaling):
    """Only the first `fraction` of the angles turn, but exponents divide by the whole head; the others stay at zero."""

    type: Literal["proportional"] = "proportional"
    fraction: float = Field(gt=0, le=1)
    factor: PositiveFloat = 1.0


class RopeSpec(Spec):
    """Rotary embedding of queries and keys (arXiv:2104.09864)."""

    theta: PositiveFloat = 10_000.0
    layout: Literal["half", "interleaved"] = "half"
    """Which channels turn together: i with i + d/2 (`half`) or 2i with 2i + 1 (`interleaved`)."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """The leading share of a head's channels that turns; the others pass through."""
    scaling: choice_of(RopeScaling) | None = None  # type: ignore[valid-type]
    arithmetic: Literal["model", "fp32", "complex"] = "model"
    """Of the rotation: in the model's dtype, in fp32, or with `complex` numbers of two fp32 (interleaved only), which
    differ from fp32 in the last bit."""

    def rotary_dim(self, head_dim: int) -> int:
        """How many of a head's channels turn."""
        return int(head_dim * self.fraction)

    def shrunk(self, head_dim: int) -> RopeSpec:
        """The same positions for the heads of a tiny twin."""
        fraction = self.fraction if self.rotary_dim(head_dim) % 2 == 0 else 0.5
        changed = self.replace(fraction=fraction)
        scaling = self.scaling and self.scaling.shrunk(changed.rotary_dim(head_dim))
        return changed.replace(scaling=scaling)

    @model_validator(mode="after")
    def _check(self) -> RopeSpec:
        if isinstance(self.scaling, ProportionalScaling) and self.fraction != 1:
            raise problem("fraction", self.fraction, "must be 1 with proportional scaling, which has its own fraction")
        if self.arithmetic == "complex" and self.layout != "interleaved":
            raise problem("arithmetic", "complex", "needs layout interleaved")
        return self
