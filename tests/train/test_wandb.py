"""Weights & Biases offline, for real: what is written is read back from its own log."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from zoo.spec.train import NoLoggerSpec, WandbSpec
from zoo.train.events import Alerted, RolledBack, StepDone
from zoo.train.reporters import make_reporters

BLOCK = 32768
CONFIG = {"model": {"name": "tiny_moe"}, "train": {"steps": 20, "log_every": 10}}


def log_records(path: Path) -> Iterator:
    """The records of a `.wandb` file: a 7-byte header, then blocks of (checksum, length, kind, part of a record)."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # the writer is a process of its own: wait until it has ended
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def items(values) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in values}


@pytest.fixture
def run(monkeypatch) -> SimpleNamespace:
    """Settings that choose wandb, without what the environment of the tests says about it."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    return SimpleNamespace(logger=WandbSpec(), train=SimpleNamespace(log_every=10), to_dict=lambda: CONFIG)


def test_a_run_is_written_offline_and_in_silence(tmp_path, made_up_run, feed, run, capfd) -> None:
    events = list(made_up_run(num_steps=20))
    _, reporter, _ = make_reporters(run, tmp_path)
    feed(reporter, iter(events))
    reporter.alerted(Alerted(17, "loss_spike", "the loss is 7.1 after 2.3", 15))
    reporter.rolled_back(RolledBack(10, 17, "loss_spike", "loss_spike at step 17: on from step 10"))
    reporter.close()
    assert capfd.readouterr() == ("", "")
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    records = list(log_records(log))
    by_kind = {record.WhichOneof("record_type"): record for record in records}
    assert by_kind["run"].run.project == "zoo"
    assert by_kind["run"].run.display_name == tmp_path.name
    config = {update.key: json.loads(update.value_json) for update in by_kind["run"].run.config.update}
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert by_kind["exit"].exit.exit_code == 0
    told = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    assert [(alert.title, alert.level) for alert in told] == [("loss_spike", "WARN"), ("rolled back", "INFO")]
    assert told[0].text == "step 17: the loss is 7.1 after 2.3"
    history = [items(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    steps = [row for row in history if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 21))
    expected = [event for event in events if isinstance(event, StepDone)]
    assert [row["loss"] for row in steps] == [event.loss for event in expected]
    assert steps[9]["routing/layer_02/num_dead"] == 1
    assert steps[9]["routing/worst_max_violation"] == max(health.max_violation for health in expected[9].routing)
    assert not any(key.startswith("routing") for key in steps[8])
    (held_out,) = (row for row in history if "held_out/bits_per_byte" in row)
    assert held_out["step"] == 20
    summary = {}
    for record in records:
        summary |= items(record.summary.update)
    assert summary["num_params"] == 1_063_424
    assert summary["baseline/order-2 bytes/bits_per_byte"] == 2.655
    assert summary["reason"] == "done"


def test_a_run_that_breaks_off_is_marked_and_its_continuation_is_of_the_same_group(
    tmp_path, made_up_run, feed, run
) -> None:
    for events in (list(made_up_run(num_steps=20))[:5], list(made_up_run(num_steps=20, first_step=2))):
        _, reporter, _ = make_reporters(run, tmp_path)
        feed(reporter, iter(events))
        reporter.close()
    logs = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    kinds = [{record.WhichOneof("record_type"): record for record in log_records(log)} for log in logs]
    assert [records["exit"].exit.exit_code for records in kinds] == [1, 0]
    assert [records["run"].run.run_group for records in kinds] == [tmp_path.name] * 2
    assert kinds[0]["run"].run.run_id != kinds[1]["run"].run.run_id


def test_online_without_a_login_is_one_clear_error_without_a_prompt(tmp_path) -> None:
    code = (
        "from pathlib import Path; from zoo.spec.base import ConfigError; from zoo.spec.train import WandbSpec\n"
        "from zoo.train.wandb_logger import WandbReporter\n"
        "try: WandbReporter(WandbSpec(mode='online'), Path('run'), {})\n"
        "except ConfigError as error: print(error)"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert result.stdout.startswith("logger.mode: found 'online'; wandb does not start: No API key")
    assert result.stdout.rstrip().endswith("log in with `wandb login`, or choose logger.mode=offline")


def test_wandb_is_imported_only_when_it_is_chosen(tmp_path) -> None:
    run = SimpleNamespace(logger=NoLoggerSpec(), train=SimpleNamespace(log_every=1))
    assert len(make_reporters(run, tmp_path)) == 2
    code = (
        "import sys, zoo.train.reporters, zoo.train.wandb_logger\n"
        "assert not {'wandb', 'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
