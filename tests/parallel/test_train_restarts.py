"""A run that torch's elastic agent starts again, after a process was stopped and after one was killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rank_kills import last_weights, launch, passed_over, pids, told

SETTINGS = ["train.steps=14", "train.eval_every=7"]


class Striker:
    """Sends signals to process 1, each when so many steps are on record."""

    def __init__(self, folder: Path, *strikes: tuple[int, signal.Signals]) -> None:
        self.folder, self.strikes, self.over = folder, strikes, False
        self.thread = threading.Thread(target=self._strike)
        self.thread.start()

    def join(self) -> None:
        self.over = True
        self.thread.join()

    def _strike(self) -> None:
        for attempt, (step, number) in enumerate(self.strikes, 1):
            while not self.over and (attempt not in pids(self.folder) or self._steps() < step):
                time.sleep(0.02)
            if not self.over:
                os.kill(pids(self.folder)[attempt][1], number)

    def _steps(self) -> int:
        path = self.folder / "run/metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return max((json.loads(line)["step"] for line in lines), default=0)


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == name]


@pytest.mark.filterwarnings("default")  # the agent's own
def test_stopped_and_killed_equals_undisturbed(tmp_path: Path) -> None:
    whole, struck = tmp_path / "whole", tmp_path / "struck"
    launch(whole, 2, SETTINGS, max_restarts=0)
    striker = Striker(struck, (3, signal.SIGTERM), (9, signal.SIGKILL))
    try:
        launch(struck, 2, SETTINGS, max_restarts=2)
    finally:
        striker.join()
    assert told(struck / "run") == told(whole / "run")
    assert last_weights(struck / "run") == last_weights(whole / "run")
    assert passed_over(struck) == []
    statuses = {path.name: path.read_text() for path in (struck / "statuses").iterdir()}
    assert {statuses["1_0"], statuses["1_1"]} == {"143"}  # both have stopped at the same step, and saved it
    assert "2_1" not in statuses  # was killed
    assert {statuses["3_0"], statuses["3_1"]} == {"0"}
    assert events(struck / "run", "finished")[0]["reason"] == "interrupted"
    started = [event["first_step"] for event in events(struck / "run", "started")]
    assert len(started) == 3
    assert 3 <= started[1] <= 5  # what SIGTERM had saved
    assert started[2] >= 5
    # Process 0 speaks for all.
    assert (struck / "output_0.txt").read_text().count("model     tiny_moe") == 3
    assert "model" not in (struck / "output_1.txt").read_text()
