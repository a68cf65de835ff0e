"""Norms of the residual stream and inside blocks."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, model_validator

from zoo.spec.base import Spec, problem


class NormSpec(Spec):
    """One normalisation over the last axis, computed in fp32 whatever the model's dtype."""

    type: Literal["rms", "layer"] = "rms"
    """`rms`: divide by the root mean square; `layer`: subtract the mean, divide by the standard deviation."""
    eps: PositiveFloat = 1e-6
    weight: Literal["plain", "fp32", "wide", "plus_one", "none"] = "plain"
    """`plain`: cast back, then multiply by w. `fp32`: multiply by w in fp32, then cast. `wide`: the same, but in fp64
    where w is. `plus_one`: multiply by 1 + w in fp32, w starting at 0. `none`: no weight."""
    bias: bool = False
    """A learned offset (`layer` only)."""

    @model_validator(mode="after")
    def _check(self) -> NormSpec:
        if self.bias and self.type != "layer":
            raise problem("bias", True, "needs type layer")
        return self
