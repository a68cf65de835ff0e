"""How far a tokenization has come, on the standard error: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

_PATIENCE_S = 2.0
"""What is done sooner shows nothing."""
_LINE_EVERY_S = 30.0


class Progress:
    """Told of bytes, in any steps.

    Args:
        total: Bytes of all files; 0: unknown.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._first: int | None = None  # done by an earlier call: no part of the speed
        self._started = self._told = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int) -> None:
        """So many bytes are done."""
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if now - self._started < _PATIENCE_S:
            return
        if self._bar is None and sys.stderr.isatty():
            self._bar = self._start_bar()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
        elif now - self._told >= _LINE_EVERY_S:
            self._told = now
            rate = (done - self._first) / (now - self._started) / 1e6
            share = f" of {self._total / 1e6:.0f}" if self._total else ""
            print(f"{self._what}: {done / 1e6:.0f}{share} MB read, {rate:.2g} MB/s", file=sys.stderr, flush=True)

    def _start_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        columns = [TextColumn(self._what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
        bar = Bar(*columns, console=Console(stderr=True), transient=True)
        bar.add_task(self._what, total=self._total or None, completed=self._first or 0)
        bar.start()
        return bar
