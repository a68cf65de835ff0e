"""What each parameter of a decoder is to initial weights and optimizers."""

from __future__ import annotations

from enum import StrEnum

from torch import Tensor


class Role(StrEnum):
    """What a parameter is."""

    MATRIX = "matrix"
    EXPERTS = "experts"
    """A stack of matrices, one per expert."""
    ROUTER = "router"
    EMBEDDING = "embedding"
    HEAD = "head"
    VECTOR = "vector"
    """Norm weights, biases, and whatever else is no matrix."""


def role_of(name: str, parameter: Tensor) -> Role:
    """The role of a parameter of a decoder, from its name and shape."""
    parts = name.split(".")
    experts = "experts" in parts
    # Logarithms of decays are rates, though a state-space layer may hold one for each entry of its state.
    no_product = parts[-1].endswith(("bias", "_log")) or any("norm" in part for part in parts)
    if parameter.ndim != (3 if experts else 2) or no_product:
        return Role.VECTOR
    if experts:
        return Role.EXPERTS
    if "router" in parts:
        return Role.ROUTER
    return {"embed": Role.EMBEDDING, "head": Role.HEAD}.get(parts[0], Role.MATRIX)


INNER = frozenset({Role.MATRIX, Role.EXPERTS})
"""Matrices inside the layers: both their sides grow with the width of the model."""
OUTPUTS = frozenset({Role.ROUTER, Role.HEAD})
"""Matrices from the width to a number of choices that does not grow."""


def init_scale(role: Role, width_ratio: float) -> float:
    """Factor on the initial weights of a model `width_ratio` times as wide as the one that they were found on.

    What a matrix inside the layers puts out keeps its size, what becomes logits shrinks (arXiv:2203.03466, table 3).
    """
    if role in INNER:
        return width_ratio**-0.5
    return 1 / width_ratio if role in OUTPUTS else 1.0
