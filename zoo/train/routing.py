"""Routing health: how evenly a layer's router spreads the choices over its experts. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zoo.train.events import LayerHealth


@dataclass(frozen=True)
class RoutingSummary:
    """The layers of a model in four numbers."""

    mean_entropy: float
    worst_max_violation: float
    worst_layer: int
    """The layer with the largest MaxVio; the first one when several share it."""
    num_dead: int
    """Dead experts of all layers together."""


def layer_health(layer: int, load: ArrayLike) -> LayerHealth:
    """Judge the load of one layer.

    Entropy is -sum(p ln p) / ln(num_experts) with p = load / sum(load); MaxVio is that of arXiv:2408.15664. A single
    expert counts as even. When there was no choice at all, entropy and MaxVio are 0 and every expert is dead.

    Args:
        load: `[num_experts]`, the whole number of choices that each expert received.

    Raises:
        ValueError: `load` is not a non-empty list of whole numbers, 0 or above.
    """
    counts = np.asarray(load)
    if counts.ndim != 1 or counts.size == 0 or counts.dtype.kind not in "iu" or counts.min() < 0:
        raise ValueError(f"the load must be a list of whole numbers, 0 or above, one per expert; found {load!r}")
    mean = float(counts.mean())
    return LayerHealth(
        layer=layer,
        load=tuple(int(count) for count in counts),
        entropy=_normalised_entropy(counts),
        max_violation=float(counts.max()) / mean - 1 if mean else 0.0,
        num_dead=int((counts == 0).sum()),
    )


def _normalised_entropy(counts: NDArray[np.integer]) -> float:
    total = counts.sum()
    if total == 0 or counts.size == 1:
        return float(total > 0)
    share = counts[counts > 0] / total
    entropy = -float((share * np.log(share)).sum()) / math.log(counts.size)
    return min(1.0, max(0.0, entropy))  # rounding may step over the bounds


def summary(layers: Sequence[LayerHealth]) -> RoutingSummary:
    """Sum up at least one layer."""
    worst = max(layers, key=lambda health: health.max_violation)
    return RoutingSummary(
        mean_entropy=sum(health.entropy for health in layers) / len(layers),
        worst_max_violation=worst.max_violation,
        worst_layer=worst.layer,
        num_dead=sum(health.num_dead for health in layers),
    )
