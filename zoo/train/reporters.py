"""Who follows a run: its metrics file, a display, and the service that the settings name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from zoo.spec.train import WandbSpec
from zoo.train.display import LiveDisplay, PlainDisplay
from zoo.train.events import Reporter
from zoo.train.metrics_file import METRICS, MetricsFile

if TYPE_CHECKING:
    from zoo.spec.run import RunSpec


def make_reporters(run: RunSpec, run_dir: Path) -> list[Reporter]:
    """The reporters of a run, in the order in which they should hear of an event.

    Raises:
        ConfigError: the chosen service does not start.
    """
    reporters: list[Reporter] = [MetricsFile(run_dir / METRICS)]
    if isinstance(run.logger, WandbSpec):
        from zoo.train.wandb_logger import WandbReporter

        reporters.append(WandbReporter(run.logger, run_dir, run.to_dict()))
    return [*reporters, _display(run.train.log_every)]


def _display(log_every: int) -> Reporter:
    """Live where a person watches a terminal that can draw it, plain lines into files, pipes and old terminals."""
    console = Console()
    draws = console.is_terminal and not console.is_dumb_terminal and not console.options.ascii_only
    return LiveDisplay(console) if draws else PlainDisplay(log_every, sys.stdout)
