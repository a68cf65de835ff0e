"""Stop a run between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self


class StopSignal:
    """While entered, the first SIGINT or SIGTERM asks the run to stop after its step, and a second one acts at once."""

    def __init__(self) -> None:
        self.number = 0
        """Of the signal that came; 0 while there was none."""
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
        if self.requested:
            raise KeyboardInterrupt
        self.number = number
