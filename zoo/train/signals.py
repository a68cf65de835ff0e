"""Stop a run between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

_PATIENCE = 3
"""Signals after which one of several processes acts at once: torchrun passes on what it gets, and so may a cluster."""


class StopSignal:
    """While entered, the first SIGINT or SIGTERM asks the run to stop after its step, and a second one acts at once.

    Args:
        patient: One of several processes, which hear of the same signal more than once.
    """

    def __init__(self, patient: bool = False) -> None:
        self.number = 0
        """Of the signal that came, here or to another process of the run; 0 while there was none."""
        self._left = _PATIENCE if patient else 1
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return bool(self.number)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        self.number = number
