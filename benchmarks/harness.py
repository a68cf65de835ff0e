"""Measuring on noisy machines: candidates in turns, medians, memory above the start."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measured claim: something of ours beside a peer or a limit, in the same run."""

    what: str
    ours: str
    other: str
    """The peer or the limit, and its figure."""
    ratio: float
    """How many times better ours is; below 1: worse."""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def interleaved(candidates: Mapping[str, Callable[[], object]], rounds: int = 7, warmup: int = 2) -> dict[str, float]:
    """Median seconds of a call of each candidate, the calls taken in turns so that noise hits all alike."""
    for _ in range(warmup):
        for call in candidates.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_extra_mib(call: Callable[[], object]) -> float:
    """Most resident memory during a call above that before it, in MiB (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present size
    before = _resident_mib("VmRSS")
    call()
    return max(0.0, _resident_mib("VmHWM") - before)


def _resident_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")
