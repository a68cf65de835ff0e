"""Kills, full disks, damaged checkpoints and vanished text: what was saved stays, and the run goes on from it."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kills
from tests.train.runs import Listener, small_run
from zoo.spec.base import ConfigError
from zoo.train import crew, loop
from zoo.train.checkpoint import MODEL, OPTIMIZER
from zoo.train.errors import TrainingError
from zoo.train.metrics_file import MetricsFile, read_metrics
from zoo.train.rundir import STATE, find_checkpoints, publish, sound_checkpoint

SAVING = ("train.steps=12", "checkpoint.every=3", "checkpoint.resume=auto")


pytestmark = pytest.mark.usefixtures("known_machine")


@contextmanager
def full_disk(max_bytes: int = 20_000) -> Iterator[None]:
    """No file grows beyond `max_bytes`: what a full disk does to large files, without one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def train(folder: Path, *overrides: str, name: str = "run") -> Listener:
    listener, metrics = Listener(), MetricsFile(folder / name / "metrics.jsonl")
    try:
        loop.train(small_run(folder, *SAVING, *overrides), folder / name, [metrics, listener])
    finally:
        metrics.close()
    return listener


def save_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The checkpoints of these steps find the disk full."""
    save = crew.save_checkpoint

    def limited(run_dir: Path, step: int, *arguments: Any) -> Path:
        if step not in steps:
            return save(run_dir, step, *arguments)
        with full_disk():
            return save(run_dir, step, *arguments)

    monkeypatch.setattr(crew, "save_checkpoint", limited)


def steps_in(run_dir: Path) -> list[int]:
    return [checkpoint.step for checkpoint in find_checkpoints(run_dir)[0]]


@pytest.mark.parametrize("kind", [kills.ANYWHERE, kills.SAVING])
def test_killed_runs_go_on_bit_by_bit(tmp_path: Path, kind: str) -> None:
    killer = kills.Killer(kills.settings(tmp_path), seed=1)
    killer.undisturbed(tmp_path / "whole")
    for index in range(2):
        assert kills.case(killer, tmp_path / str(index), kind, tmp_path)[1] == ""
        assert kills.learned(tmp_path / str(index)) == kills.learned(tmp_path / "whole")


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path, name="whole")
    save_on_a_full_disk(monkeypatch, {6, 9})
    heard = train(tmp_path)
    assert [(alert.step, alert.name) for alert in heard.alerts] == [(6, "write_failed"), (9, "write_failed")]
    assert "File too large" in heard.alerts[0].message
    assert "the one of step 3 is the newest" in heard.alerts[0].message
    assert steps_in(tmp_path / "run") == [3, 12]
    assert heard.losses == whole.losses
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step_000003", "step_000012"]


def test_a_run_that_cannot_be_saved_at_its_end_fails_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        save_on_a_full_disk(patch, {9, 12})
        with pytest.raises(TrainingError, match=r"step 12 cannot be written: .*; the one of step 6 is the newest"):
            train(tmp_path)
    assert steps_in(tmp_path / "run") == [3, 6]
    assert [step.step for step in train(tmp_path).steps] == [7, 8, 9, 10, 11, 12]


def test_records_wait_while_the_disk_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Full(Listener):
        """Comes before the metrics file: the disk is full from the 3rd to the 5th step."""

        def step_done(self, event: Any) -> None:
            size = (tmp_path / "run/metrics.jsonl").stat().st_size
            limit = size + 100 if 3 <= event.step < 6 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    metrics = MetricsFile(tmp_path / "run/metrics.jsonl")
    loop.train(small_run(tmp_path), tmp_path / "run", [Full(), metrics])
    metrics.close()
    assert capsys.readouterr().err.count("its records wait in memory") == 1
    records = read_metrics(metrics.path)
    assert [record["step"] for record in records if record["event"] == "step"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE])
def test_a_flipped_bit_costs_one_checkpoint(tmp_path: Path, name: str) -> None:
    train(tmp_path)
    path = tmp_path / "run/checkpoints/step_000012" / name
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)
    heard = train(tmp_path)
    assert heard.start.first_step == 9
    assert any("step_000012" in choice and "passed over" in choice for choice in heard.start.choices)
    assert sound_checkpoint(tmp_path / "run")[0].step == 12
    set_aside = [path.name for path in (tmp_path / "run/checkpoints").glob("damaged_*")]
    assert set_aside == ([] if name == STATE else ["damaged_step_000012"])  # what is torn is not even opened


def test_nothing_starts_anew_over_damaged_checkpoints(tmp_path: Path) -> None:
    train(tmp_path)
    for path in (tmp_path / "run/checkpoints").glob(f"*/{MODEL}"):
        path.write_bytes(bytes(path.stat().st_size))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"no sound checkpoint to go on from; .*model.safetensors has changed"):
            train(tmp_path)
    for path in (tmp_path / "run/checkpoints").glob(f"*/{MODEL}"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"no sound checkpoint to go on from; .*model.safetensors is missing"):
        train(tmp_path)


def test_text_that_vanishes_does_not_take_the_run_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = loop.Session(small_run(tmp_path, *SAVING), tmp_path / "run", [])
    batch = session.batches.batch

    def vanishing(number: int) -> Any:
        if number == 7:
            raise ConfigError("data: the tokens in 000001.safetensors are damaged")
        return batch(number)

    monkeypatch.setattr(session.batches, "batch", vanishing)
    with pytest.raises(ConfigError, match=r"are damaged; a checkpoint of step 7 is saved, from which .* goes on"):
        session.run_until(loop.StopSignal())
    assert steps_in(tmp_path / "run") == [3, 6, 7]


def test_a_good_checkpoint_outlives_the_newest(tmp_path: Path) -> None:
    kept = []
    for step in (10, 50, 60, 70, 80):
        partial = tmp_path / f"checkpoints/.step_{step:06d}.partial"
        partial.mkdir(parents=True)
        (partial / STATE).write_text(json.dumps({"format": 1, "step": step, "files": {}, "good": step < 60}))
        publish(tmp_path, step, keep=2)
        kept.append(steps_in(tmp_path))
    # What goes wrong after step 50 shows at step 60; 50 must be there when 80 has shown that it was good.
    assert kept == [[10], [10, 50], [10, 50, 60], [10, 50, 60, 70], [50, 70, 80]]
