"""`metrics.jsonl`: what is written can be read back, also after a crash and a resume."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from zoo.spec.base import ConfigError
from zoo.train.events import StepDone
from zoo.train.metrics_file import MetricsFile, read_metrics


def steps(records: list[dict]) -> list[int]:
    return [record["step"] for record in records if record["event"] == "step"]


def test_every_event_is_one_record(tmp_path, made_up_run, feed) -> None:
    events = list(made_up_run(num_steps=20))
    writer = MetricsFile(tmp_path / "metrics.jsonl")
    feed(writer, iter(events))
    writer.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["event"] for record in records] == ["started", *["step"] * 20, "evaluated", "finished"]
    done = next(event for event in events if isinstance(event, StepDone) and event.step == 10)
    expected = json.loads(json.dumps(dataclasses.asdict(done)))
    assert records[10] == {"event": "step", **expected}
    assert records[10]["routing"][2]["load"][-1] == 0
    assert records[10]["routing"][2]["num_dead"] == 1
    assert records[-1]["files"] == [str(tmp_path / "metrics.jsonl"), str(tmp_path / "loss_curve.png")]


def test_each_record_is_on_disk_at_once(tmp_path, made_up_run, feed) -> None:
    writer = MetricsFile(tmp_path / "metrics.jsonl")
    for count, event in enumerate(made_up_run(num_steps=5), start=1):
        feed(writer, iter([event]))
        assert len(read_metrics(writer.path)) == count
    writer.close()


def test_a_killed_run_goes_on_without_a_second_version_of_a_step(tmp_path, made_up_run, feed) -> None:
    path = tmp_path / "metrics.jsonl"
    events = list(made_up_run(num_steps=60))
    whole = MetricsFile(tmp_path / "whole.jsonl")
    feed(whole, iter(events))
    killed = MetricsFile(path)
    feed(killed, iter(events[:34]))
    with path.open("ab") as file:
        file.write(b'{"event": "step", "st')
    resumed = MetricsFile(path)
    feed(resumed, made_up_run(num_steps=60, first_step=20))
    for writer in (whole, killed, resumed):
        writer.close()
    records = read_metrics(path)
    assert steps(records) == list(range(1, 61))
    assert [record["step"] for record in records if record["event"] == "evaluated"] == [20, 40, 60]
    assert [record["first_step"] for record in records if record["event"] == "started"] == [0, 20]
    numbers = [record for record in records if record["event"] == "step"]
    assert numbers == [record for record in read_metrics(tmp_path / "whole.jsonl") if record["event"] == "step"]


def test_a_run_from_the_start_writes_a_new_file(tmp_path, made_up_run, feed) -> None:
    for _ in range(2):
        writer = MetricsFile(tmp_path / "metrics.jsonl")
        feed(writer, made_up_run(num_steps=5))
        writer.close()
    assert steps(read_metrics(writer.path)) == [1, 2, 3, 4, 5]


def test_a_resumed_run_without_its_file_starts_one(tmp_path, made_up_run, feed) -> None:
    writer = MetricsFile(tmp_path / "new" / "metrics.jsonl")
    feed(writer, made_up_run(num_steps=25, first_step=20))
    writer.close()
    assert steps(read_metrics(writer.path)) == [21, 22, 23, 24, 25]


def test_numbers_that_are_not_finite_are_null(tmp_path, made_up_run, feed) -> None:
    started, step, *_ = made_up_run(num_steps=5)
    broken = dataclasses.replace(step, loss=math.nan, grad_norm=math.inf, losses={"balance": -math.inf}, mfu=None)
    writer = MetricsFile(tmp_path / "metrics.jsonl")
    feed(writer, iter([started, broken]))
    writer.close()
    record = read_metrics(writer.path)[1]
    assert (record["loss"], record["grad_norm"], record["losses"], record["mfu"]) == (
        None,
        None,
        {"balance": None},
        None,
    )


def test_close_can_come_at_any_time(tmp_path, made_up_run, feed) -> None:
    never_started = MetricsFile(tmp_path / "metrics.jsonl")
    never_started.close()
    assert not never_started.path.exists()
    feed(never_started, made_up_run(num_steps=2))
    never_started.close()
    never_started.close()


@pytest.mark.parametrize("line", [b"not json\n", b"[1]\n", b'{"event": "step"}\n', b"\xff\xfe\n"])
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "started", "step": 0}\n' + line)
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 2: .*remove that line"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no metrics file"):
        read_metrics(tmp_path / "metrics.jsonl")
