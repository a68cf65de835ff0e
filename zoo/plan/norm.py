"""The weights of norms. Their arithmetic is not counted: it is no matrix product."""

from __future__ import annotations

from zoo.plan.base import Weight
from zoo.spec.norm import NormSpec


def norm_weights(name: str, width: int, norm: NormSpec, part: str = "") -> list[Weight]:
    """The weights of a norm over `width` channels: weight [width], bias [width], as far as `norm` has them."""
    found = {"weight": norm.weight != "none", "bias": norm.bias}
    return [Weight(f"{name}.{key}", (width,), part=part) for key, there in found.items() if there]
