"""What every block description has in common: sequence mixers and channel mixers."""

from __future__ import annotations

from typing import Self

from zoo.spec.base import TypedSpec

TINY_D_MODEL = 64
"""Width of tiny twins (`zoo.spec.twin`)."""


class BlockSpec(TypedSpec):
    """A block of a layer; its `type` names the spec class, the module and the cost."""

    def resolved(self, d_model: int) -> Self:
        """The same description with widths that follow from the model's width filled in."""
        del d_model
        return self

    def shrunk(self, d_model: int) -> Self:
        """The same block with the same options for a tiny twin of width TINY_D_MODEL, from one of width `d_model`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it shrinks")


class MixerSpec(BlockSpec):
    """A sequence mixer: lets positions exchange information."""


class FFNSpec(BlockSpec):
    """A channel mixer: works on each position alone."""


def scaled(width: int, d_model: int, at_least: int = 16, at_most: int = 4 * TINY_D_MODEL) -> int:
    """A width in the same proportion to TINY_D_MODEL as to `d_model`: a multiple of 8 within bounds."""
    return max(at_least, min(at_most, round(width * TINY_D_MODEL / d_model / 8) * 8))
