"""The tiny twin of a model: the same blocks and rules at a size that trains on a laptop in seconds."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.spec.block import TINY_D_MODEL
from zoo.spec.model import ModelSpec
from zoo.spec.pattern import compress, expand

VOCAB_SIZE = 256
"""Bytes."""
MIN_LAYERS = 4
POSITIONS = 512


def shrink(spec: ModelSpec) -> ModelSpec:
    """A model of some 100,000 parameters with the same kinds of layers, routing rules, norms, biases and scalars.

    Widths, heads, experts and repeats shrink (`BlockSpec.shrunk`); options stay. The order of the layers is that of the
    whole model's beginning, with long runs of one kind cut to two, until every kind has come.
    """
    embedding = spec.embedding
    if embedding.positions is not None:
        embedding = embedding.replace(positions=min(embedding.positions, POSITIONS))
    return spec.replace(
        name=f"{spec.name}_tiny",
        card=None,
        d_model=TINY_D_MODEL,
        vocab_size=min(spec.vocab_size, VOCAB_SIZE),
        slots={name: block.shrunk(spec.d_model) for name, block in spec.slots.items()},
        layers=compress(_few(spec.layer_kinds)),
        mtp=spec.mtp and spec.mtp.replace(layers=compress(expand(spec.mtp.layers)[:MIN_LAYERS])),
        embedding=embedding,
    )


def _few(layers: Sequence[str]) -> tuple[str, ...]:
    """The shortest beginning of `layers`, its runs cut to two, that has every kind and at least MIN_LAYERS."""
    cut = [kind for index, kind in enumerate(layers) if tuple(layers[max(0, index - 2) : index]) != (kind, kind)]
    kinds = set(layers)
    length = next(length for length in range(1, len(cut) + 1) if set(cut[:length]) == kinds)
    return tuple(cut[: max(length, min(MIN_LAYERS, len(cut)))])
