"""Small runs that the tests of training share."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from zoo.config import compose
from zoo.spec.run import RunSpec, decode_run
from zoo.train.events import Alerted, Evaluated, RolledBack, RunFinished, RunStarted, StepDone

RUN = [
    "data=files",
    "data.paths=elsewhere",
    "hardware=cpu",
    "precision=fp32",
    "optimizer.lr=1e-2",
    "train.steps=6",
    "train.batch_size=4",
    "train.seq_len=16",
    "train.eval_every=null",
    "train.eval_tokens=256",
    "train.sample_tokens=4",
    "checkpoint.every=null",
]
"""A few steps of any model."""
SMALL = [
    "model=tiny_moe",
    "model.d_model=32",
    "model.layers='2*sparse'",
    "model.moe.d_expert=32",
    *RUN,
    "train.log_every=3",
]


def small_run(folder: Path, *overrides: str) -> RunSpec:
    """A run of a few steps on a text of its own in `folder`."""
    text = folder / "text.txt"
    if not text.exists():
        words = random.Random(0).choices("abstract brown class def for in return self x y".split(), k=2000)
        text.write_text(" ".join(words))
    run = _composed(overrides)
    return run.replace(data=run.data.replace(paths=(str(text),)))


@cache
def _composed(overrides: tuple[str, ...]) -> RunSpec:
    return decode_run(compose([*SMALL, *overrides]))


class Listener:
    """A reporter that keeps what it hears."""

    def __init__(self) -> None:
        self.steps: list[StepDone] = []
        self.evaluations: list[Evaluated] = []
        self.alerts: list[Alerted] = []
        self.rollbacks: list[RolledBack] = []

    def started(self, event: RunStarted) -> None:
        self.start = event

    def step_done(self, event: StepDone) -> None:
        self.steps.append(event)

    def evaluated(self, event: Evaluated) -> None:
        self.evaluations.append(event)

    def alerted(self, event: Alerted) -> None:
        self.alerts.append(event)

    def rolled_back(self, event: RolledBack) -> None:
        self.rollbacks.append(event)

    def finished(self, event: RunFinished) -> None:
        self.end = event

    def close(self) -> None:
        pass

    @property
    def losses(self) -> list[dict[str, float]]:
        return [step.losses for step in self.steps]
