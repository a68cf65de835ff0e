"""What the run directories below a folder say: one row a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from zoo.spec.base import ConfigError
from zoo.train.metrics_file import METRICS, read_metrics
from zoo.train.rundir import flat
from zoo.train.sweep import FAILURE, finished_at, saved_settings

UNTOLD = ("model.name", "model.card", "checkpoint", "logger", "hardware")
"""Settings that no table of a sweep needs."""


@dataclass(frozen=True)
class Run:
    """A run, finished or not."""

    path: Path
    name: str
    """Of its directory, below the folder that was asked for."""
    settings: dict[str, Any]
    """By dotted path; `model` is its name."""
    params: int
    active_params: int
    num_steps: int
    step: int
    """Done so far."""
    tokens_per_step: int
    """Of the whole batch; it may have been smaller at first."""
    tokens: int
    """Targets trained on."""
    evaluations: tuple[tuple[int, float, float], ...]
    """Steps, nats a token and bits per byte on held-out text."""
    seconds: float
    """Of all steps that are on record."""
    step_time_s: float | None
    """Median."""
    state: str
    """`done`, `unfinished` or what it failed of."""

    @property
    def done(self) -> bool:
        return self.state == "done"

    @cached_property
    def last(self) -> tuple[float, float] | None:
        """Nats a token and bits per byte of the last evaluation."""
        return self.evaluations[-1][1:] if self.evaluations else None


def runs_below(folder: Path) -> tuple[list[Run], list[str]]:
    """The runs below a folder in the order of their names, and a note for each that cannot be read.

    Raises:
        ConfigError: there is no such folder, or no run below it.
    """
    if not folder.is_dir():
        raise ConfigError(f"DIR: found '{folder}'; there is no such directory; name one that holds runs, as outputs/")
    found, notes = [], []
    for path in sorted(folder.rglob(METRICS), key=_numbered):
        try:
            found.append(_run(path.parent, folder))
        except ConfigError as error:
            notes.append(f"left out {path.parent}: {error}")
    if not found:
        raise ConfigError(f"DIR: found '{folder}'; no run below it can be read" + "".join(f"\n  {n}" for n in notes))
    return found, notes


def _numbered(path: Path) -> list[tuple[int, int, str]]:
    """An order in which job 10 comes after job 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.parts]


def _run(path: Path, folder: Path) -> Run:
    try:
        return _run_of(read_metrics(path / METRICS), path, folder)
    except ConfigError:
        raise
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        what = f"a field of a record is missing or of another type ({error})"
        raise ConfigError(f"{path / METRICS}: {what}; remove that run") from None


def _run_of(records: Sequence[Mapping[str, Any]], path: Path, folder: Path) -> Run:
    starts = [record for record in records if record["event"] == "started"]
    if not starts:
        raise ConfigError(f"{path / METRICS}: has not begun")
    start, steps = starts[-1], [record for record in records if record["event"] == "step"]
    times = [float(record["step_time_s"]) for record in steps]
    evaluations = [
        (int(record["step"]), float(record["loss"]), float(record["bits_per_byte"]))
        for record in records
        if record["event"] == "evaluated" and record["loss"] is not None
    ]
    return Run(
        path=path,
        name=str(path.relative_to(folder)),
        settings={"model": str(start["model_name"]), **dict(flat(saved_settings(path)))},
        params=int(start["num_params"]),
        active_params=int(start["num_active_params"]),
        num_steps=int(start["num_steps"]),
        step=int(records[-1]["step"]),
        tokens_per_step=int(start["tokens_per_step"]),
        tokens=sum(int(record.get("num_tokens") or start["tokens_per_step"]) for record in steps),
        evaluations=tuple(found for found in evaluations if all(map(math.isfinite, found))),
        seconds=sum(times),
        step_time_s=statistics.median(times) if times else None,
        state=_state(path, records, start["num_steps"]),
    )


def _state(path: Path, records: Sequence[Mapping[str, Any]], num_steps: int) -> str:
    if finished_at(records, num_steps) is not None:
        return "done"
    failure = path / FAILURE
    return failure.read_text(encoding="utf-8").strip() if failure.is_file() else "unfinished"


def varied(runs: Sequence[Run]) -> list[str]:
    """The settings in which the runs differ, those with the fewest values first.

    Of settings that vary together (a width and the heads that follow from it) the first stands for the others.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    columns: dict[tuple[str, ...], str] = {}
    for key in keys:
        values = [str(run.settings.get(key, "-")) for run in runs]
        if len(set(values)) > 1 and not key.startswith(UNTOLD):
            columns.setdefault(tuple(str(values.index(value)) for value in values), key)
    return sorted(columns.values(), key=lambda key: len({str(run.settings.get(key)) for run in runs}))


def best_of(runs: Sequence[Run]) -> Run | None:
    """The finished run with the fewest bits per byte on held-out text."""
    done = [run for run in runs if run.done and run.last]
    return min(done, key=lambda run: run.last[1] if run.last else float("inf"), default=None)
