"""Which reporters follow a run."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from zoo.spec.train import NoLoggerSpec
from zoo.train.display import LiveDisplay, PlainDisplay
from zoo.train.metrics_file import MetricsFile
from zoo.train.reporters import make_reporters

RUN = SimpleNamespace(logger=NoLoggerSpec(), train=SimpleNamespace(log_every=7))


def test_files_and_pipes_get_plain_lines(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    metrics, display = make_reporters(RUN, tmp_path)
    assert isinstance(metrics, MetricsFile)
    assert metrics.path == tmp_path / "metrics.jsonl"
    assert isinstance(display, PlainDisplay)
    assert display.log_every == 7


@pytest.mark.parametrize(
    ("term", "encoding", "kind"),
    [("xterm", "utf-8", LiveDisplay), ("dumb", "utf-8", PlainDisplay), ("xterm", "ascii", PlainDisplay)],
)
def test_terminals_get_what_they_can_draw(tmp_path: Path, monkeypatch, term, encoding, kind) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", term)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(make_reporters(RUN, tmp_path)[-1], kind)
