"""A run killed at a random step and resumed is the run that was never killed, to the last bit."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 90
OVERRIDES = [
    "model=tiny_moe",
    "model.d_model=32",
    "model.layers='2*sparse'",
    "model.moe.d_expert=32",
    "data=files",
    "data.paths=text.txt",
    "hardware=cpu",
    "precision=fp32",
    f"train.steps={STEPS}",
    "train.batch_size=4",
    "train.micro_batch=2",
    "train.seq_len=16",
    "train.eval_every=40",
    "train.eval_tokens=64",
    "train.sample_tokens=0",
    "checkpoint.every=7",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = random.Random(0).choices("abstract brown class def for in return self x y".split(), k=3000)
    (tmp_path / "text.txt").write_text(" ".join(words))
    return tmp_path


def start(folder: Path, run_dir: str, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "train.py"), *OVERRIDES, f"hydra.run.dir={run_dir}", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )


def records(run_dir: Path, event: str) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record for record in map(json.loads, lines) if record["event"] == event]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    while len(records(run_dir, "step")) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def what_is_learned(run_dir: Path) -> list[tuple[Any, ...]]:
    steps = [(r["step"], r["losses"], r["grad_norm"], r["routing"]) for r in records(run_dir, "step")]
    return steps + [(r["step"], r["loss"]) for r in records(run_dir, "evaluated")]


def test_killed_and_resumed_equals_never_killed(folder: Path) -> None:
    whole, killed = start(folder, "whole"), start(folder, "killed")
    wait_for_step(folder / "killed", random.randint(10, STEPS // 2), killed)
    killed.kill()
    killed.communicate()
    before = len(records(folder / "killed", "step"))
    assert before < STEPS
    resumed = start(folder, "killed", "checkpoint.resume=auto")
    for process in (whole, resumed):
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    first_step = records(folder / "killed", "started")[-1]["first_step"]
    assert 0 < first_step <= before
    assert what_is_learned(folder / "killed") == what_is_learned(folder / "whole")


def test_interrupted_run_saves_names_the_way_on_and_refuses_other_settings(folder: Path) -> None:
    process = start(folder, "run", "train.steps=100000", "checkpoint.every=null")
    wait_for_step(folder / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143, errors
    assert "go on with: python train.py model=tiny_moe" in errors
    assert "checkpoint.resume=" in errors
    done = records(folder / "run", "step")[-1]["step"]
    assert [path.name for path in (folder / "run/checkpoints").iterdir()] == [f"step_{done:06d}"]
    assert records(folder / "run", "finished")[-1]["reason"] == "interrupted"

    command = [sys.executable, str(ROOT / "train.py"), *OVERRIDES, "checkpoint.resume=run", "optimizer.lr=0.5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    refused = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    assert refused.returncode == 2
    assert re.search(r"optimizer\.lr: was [0-9.]+, now 0\.5", refused.stderr)
