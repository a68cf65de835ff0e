"""The most memory that a run held."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMeter:
    """Watches a device from now on.

    On GPUs by the counters of torch's allocator. On a processor torch has none: there it is the growth of the memory
    that the process has in use, by the kernel's count, where the system is Linux.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._before = 0.0
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):  # where that is forbidden it is the peak of the whole process
            _CLEAR.write_text("5", encoding="ascii")  # the peak starts anew at the present size
        self._before = _resident_gib("VmRSS") or 0.0

    def gib(self) -> float | None:
        """The peak since the start, above what was held then; None: this system does not say."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated() / 2**30
        peak = _resident_gib("VmHWM")
        return None if peak is None else max(0.0, peak - self._before)


def _resident_gib(field: str) -> float | None:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(field + ":")), None)
