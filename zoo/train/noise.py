"""The gradient noise scale: how many tokens a batch takes before more of them stop to help (arXiv:1812.06162)."""

from __future__ import annotations

import math
from typing import Any

_DECAY = 0.9
"""Of the running means: one measurement is far too noisy."""


class NoiseScale:
    """Estimates tr(S) / |G|^2 from the norms of gradients over few and over many tokens (appendix A.1)."""

    def __init__(self) -> None:
        self._norm = self._trace = 0.0

    def take(self, small_norm: float, small_tokens: int, big_norm: float, big_tokens: int) -> None:
        """Of one step: the norm of the mean gradient over some of its tokens, and over all of them."""
        if not 0 < small_tokens < big_tokens or not math.isfinite(small_norm + big_norm):
            return
        small, big = small_norm**2, big_norm**2
        norm = (big_tokens * big - small_tokens * small) / (big_tokens - small_tokens)
        trace = (small - big) / (1 / small_tokens - 1 / big_tokens)
        self._norm = _DECAY * self._norm + (1 - _DECAY) * norm
        self._trace = _DECAY * self._trace + (1 - _DECAY) * trace

    @property
    def tokens(self) -> float | None:
        """The noise scale in tokens; None: nothing is measured, or the estimates are still all noise."""
        return self._trace / self._norm if self._norm > 0 and self._trace > 0 else None

    def state(self) -> list[float]:
        """For a checkpoint, as JSON."""
        return [self._norm, self._trace]

    def restore(self, state: Any) -> None:
        """Go on from what `state` gave."""
        self._norm, self._trace = (float(value) for value in state)
