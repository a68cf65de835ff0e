"""`metrics.jsonl`: every event of a run as one JSON object a line, written as it happens."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo.spec.base import ConfigError
from zoo.train.events import Alerted, Evaluated, RolledBack, RunFinished, RunStarted, StepDone

METRICS = "metrics.jsonl"


class MetricsFile:
    """Writes the file; a run that goes on continues it.

    A record holds `event` (`started`, `step`, `evaluated`, `alert`, `rolled_back` or `finished`), `step` and the fields
    of the event of that name in `zoo.train.events`. Numbers that are not known or not finite are null. What a full disk
    does not take waits in memory, so that the run goes on and the file holds whole lines only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._waiting: list[tuple[int, bytes]] = []
        """Steps and lines that are not written yet."""
        self._failed = False

    def started(self, event: RunStarted) -> None:
        """Open the file, without the records of steps after the one that the run goes on from."""
        if event.first_step and self.path.exists():
            _forget_after(self.path, event.first_step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kind = os.O_APPEND if event.first_step else os.O_APPEND | os.O_TRUNC
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | kind, 0o666)
        self._write("started", event, step=event.first_step)

    def step_done(self, event: StepDone) -> None:
        self._write("step", event)

    def evaluated(self, event: Evaluated) -> None:
        self._write("evaluated", event)

    def alerted(self, event: Alerted) -> None:
        self._write("alert", event)

    def rolled_back(self, event: RolledBack) -> None:
        """Forget the steps that are trained again; the record of the event says what they came to."""
        self._flush()
        self._waiting = [(step, line) for step, line in self._waiting if step <= event.step]
        if self.path.exists():
            _forget_after(self.path, event.step)
        self._write("rolled_back", event)

    def finished(self, event: RunFinished) -> None:
        self._write("finished", event)

    def close(self) -> None:
        if self._descriptor is not None:
            self._flush()
            if self._waiting:
                self._say(f"{len(self._waiting)} records are lost")
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, name: str, event: Any, **more: int) -> None:
        if self._descriptor is not None:
            record = {"event": name, **more, **dataclasses.asdict(event)}
            line = json.dumps(_plain(record), allow_nan=False) + "\n"
            self._waiting.append((record["step"], line.encode()))
            self._flush()

    def _flush(self) -> None:
        """Write all that waits, or nothing of it."""
        if self._descriptor is None:
            return
        end = os.fstat(self._descriptor).st_size
        left = b"".join(line for _, line in self._waiting)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            os.ftruncate(self._descriptor, end)
            if not self._failed:
                self._say(f"{error.strerror}; its records wait in memory")
            self._failed = True
        else:
            self._waiting, self._failed = [], False

    def _say(self, what: str) -> None:
        print(f"{self.path} cannot be written: {what}", file=sys.stderr)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in order. A last line that was not written to its end is left out.

    Raises:
        ConfigError: the file is missing, or a line of it is no record.
    """
    return [record for _, record in _records(path)]


def _forget_after(path: Path, step: int) -> None:
    """Cut the file after its last record of `step`: steps that are trained again must not appear twice."""
    end = 0
    for offset, record in _records(path):
        if record["step"] > step:
            break
        end = offset
    os.truncate(path, end)


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each complete record with the offset in bytes of its end."""
    if not path.is_file():
        raise ConfigError(f"{path}: found no metrics file; name the {METRICS} of a run directory")
    offset = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            return
        offset += len(line)
        try:
            record = json.loads(line)
            if not isinstance(record.get("event"), str) or not isinstance(record.get("step"), int):
                raise ValueError("event and step are missing")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{path}, line {number}: not a record of a run ({error}); remove that line") from None
        yield offset, record


def _plain(value: Any) -> Any:
    """JSON has no NaN, no infinity and no paths."""
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case Path():
            return str(value)
    return value
