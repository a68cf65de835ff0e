"""A few damaged files of every kind (`benchmarks.fuzz` takes 500), and that the harness sees what it should."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks import corruptions
from benchmarks.corruptions import MARK, Target, run_case, run_cases
from benchmarks.fuzz import TARGETS
from zoo.spec.base import ConfigError


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damage_ends_in_one_clear_error(target: Target, tmp_path: Path) -> None:
    found = run_cases(target, 2, tmp_path)
    assert not [one for one in found if one.fault]
    assert "Traceback" not in "".join(one.detail for one in found)


def _refuse(folder: Path) -> None:
    raise ConfigError("file: found nonsense")


def _fail(folder: Path) -> None:
    raise KeyError("a fault")


def _execute(folder: Path) -> None:
    (folder / MARK).touch()


@pytest.mark.parametrize(
    ("use", "kind"),
    [
        (lambda folder: None, "read"),
        (_refuse, "error"),
        (_fail, "traceback"),
        (_execute, "executed"),
        (lambda folder: bytearray(3 << 30), "memory"),
        (lambda folder: torch.empty(3 << 30, dtype=torch.uint8), "memory"),
        (lambda folder: time.sleep(20), "hang"),
    ],
)
def test_the_harness_tells_faults_apart(
    use: corruptions.Callable[[Path], object], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corruptions, "SECONDS", 2)
    place = tmp_path / "place"
    place.mkdir()
    (place / "file").write_bytes(b"content")
    assert run_case(Target("made up", lambda folder: None, ("file",), use), place, 0).kind == kind
