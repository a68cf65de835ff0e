"""What a rehearsed step takes, part by part: bytes that come and go, FLOPs, and what travels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
ACTIVATIONS, DISPATCH, LOGITS, OTHER = "activations", "dispatch", "logits", "other"
KINDS = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, DISPATCH, LOGITS, OTHER)
"""What memory is held for. `weights`: parameters and what is gathered of them. `activations` and `dispatch`: what is
kept for the backward pass, outside of routed experts and inside. `logits`: what the loss works with. `other`: what
comes and goes, such as gradients of activations."""


class Travel(NamedTuple):
    """A collective as a key of counters."""

    op: str
    """`all_gather`, `reduce_scatter`, `all_reduce`, `all_to_all`, ..."""
    axis: str
    """Of the mesh, such as `ep`."""
    size: int
    """Processes of the group."""
    dtype: str


@dataclass
class Segment:
    """A stretch of a step. Bytes count from its start."""

    now: Counter[str] = field(default_factory=Counter)
    """Bytes by kind; at the end what the segment leaves, which may be less than it found."""
    total: int = 0
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    flops: Counter[str] = field(default_factory=Counter)
    """By pass: `forward`, `backward`, and `again` for what is computed a second time."""
    calls: Counter[Travel] = field(default_factory=Counter)
    sent: Counter[Travel] = field(default_factory=Counter)
    """Bytes that the process sends, as a ring does it."""

    def change(self, kind: str, nbytes: int) -> None:
        """Take memory, or give it back."""
        self.now[kind] += nbytes
        self.total += nbytes
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.now)


@dataclass
class Ledger:
    """A whole step, added up from segments one after the other."""

    now: Counter[str] = field(default_factory=Counter)
    total: int = 0
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    where: str = ""
    """The segment of the peak."""
    phase_peaks: dict[str, int] = field(default_factory=dict)
    """The highest by the part of the step."""
    flops: Counter[str] = field(default_factory=Counter)
    calls: Counter[Travel] = field(default_factory=Counter)
    sent: Counter[Travel] = field(default_factory=Counter)

    def hold(self, nbytes: dict[str, int]) -> None:
        """What is there before the step."""
        self.now.update(nbytes)
        self.total += sum(nbytes.values())

    def add(self, segment: Segment, name: str, phase: str) -> None:
        """What happens next."""
        if self.total + segment.peak > self.peak:
            self.peak, self.where = self.total + segment.peak, name
            self.at_peak = {kind: self.now[kind] + segment.at_peak.get(kind, 0) for kind in KINDS}
        self.phase_peaks[phase] = max(self.phase_peaks.get(phase, 0), self.total + segment.peak)
        self.now.update(segment.now)
        self.total += segment.total
        self.flops.update(segment.flops)
        self.calls.update(segment.calls)
        self.sent.update(segment.sent)
