"""A sweep of 24 runs over 2 processes, killed half way and started again: 24 results, none of them twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Row
from zoo.report.runs import runs_below
from zoo.train.metrics_file import METRICS, read_metrics

SWEEP = [
    "sweep=scaling",
    "train.steps=20,40,80,160",
    "train.batch_size=8",
    "train.seq_len=64",
    "train.eval_every=null",
    "train.eval_tokens=16384",
    "train.sample_tokens=0",
    "checkpoint.every=20",
    "hydra/launcher=joblib",
    "hydra.launcher.n_jobs=2",
]
JOBS = 24


def done_below(folder: Path) -> dict[Path, int]:
    """The metrics files of finished runs, with the time of their last change."""
    found = {}
    for path in folder.rglob(METRICS):
        records = read_metrics(path)
        if records and records[-1]["event"] == "finished":
            found[path] = path.stat().st_mtime_ns
    return found


def start(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "zoo.cli", "train", *SWEEP]
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)


def rows() -> list[Row]:
    """What is there after the kill and after the second start; the ratio is 1 where all is as it should be."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(os.environ.get("ZOO_SWEEP_FOLDER", name))
        folder.mkdir(parents=True, exist_ok=True)
        first = start(folder)
        while first.poll() is None and len(done_below(folder)) < JOBS // 2:
            time.sleep(0.2)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        before = done_below(folder)
        status = start(folder).wait()
        after, (runs, _) = done_below(folder), runs_below(folder)
    again = sum(after.get(path) != changed for path, changed in before.items())
    done = sum(one.done for one in runs)
    return [
        Row("jobs done when the sweep was killed", f"{len(before)}", f"{JOBS} in all", len(before) / JOBS),
        Row("results after the same command again", f"{done}", f"{JOBS} jobs", done / JOBS),
        Row("jobs that were done and ran again", f"{again}", "0", float(again == 0)),
        Row("exit status", f"{status}", "0", float(status == 0)),
    ]
