"""The watch at work in a session: what it reads from the model, and where a run goes on after it went back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from zoo.blocks.linear_loss import IGNORED
from zoo.spec.run import RunSpec
from zoo.train.assembly import Assembly
from zoo.train.crew import Crew, Rows
from zoo.train.detectors import Signs
from zoo.train.events import Alerted
from zoo.train.gauges import ResidualGauge, UpdateGauge
from zoo.train.trainer import MakeContext, StepResult, evaluate, nonfinite
from zoo.train.watch import Watch


class Course:
    """Which batch each step reads: its own, or a later one once the run has gone back and on past some text."""

    def __init__(self) -> None:
        self.turns: list[tuple[int, int]] = [(0, 0)]
        """From so many steps done on, so many batches are added."""

    def batch_after(self, step: int) -> int:
        """The number of the batch that comes after `step` steps."""
        return step + next(ahead for start, ahead in reversed(self.turns) if start <= step)

    def turn(self, step: int, from_step: int) -> None:
        """Go on from `step` with the batch that comes after `from_step`."""
        ahead = self.batch_after(from_step) - step
        self.turns = [*(turn for turn in self.turns if turn[0] < step), (step, ahead)]


class Guard:
    """Watches the steps of one session."""

    def __init__(self, run: RunSpec, parts: Assembly, crew: Crew, batches: Rows, context: MakeContext) -> None:
        self._parts, self._crew, self._batches, self._context = parts, crew, batches, context
        self._layers = crew.moe_layers(parts.model)
        top_k = {index: moe.spec.top_k for index, moe in self._layers.items()}
        self.watch = Watch(run.train.watch, run.train.clip_norm, top_k)
        self.course = Course()
        self.rollbacks = 0
        """How often the run went back."""
        self._watches = run.train.watch.alerts
        self._residuals = ResidualGauge(parts.model.layers if self._watches else ())
        self._updates = UpdateGauge(parts.model.parameters() if self._watches else ())
        self._update = 0.0

    def look(self, step: int, result: StepResult, learning_rate: float) -> list[Alerted]:
        """Judge a step before its update; what there is to tell.

        Raises:
            TrainingError: too many steps had a loss or a gradient that is no number.
        """
        residuals = self._residuals.read()
        if flaw := nonfinite(result, self._parts.model):
            return self.watch.skipped(step, flaw, self._update)
        loads = {index: moe.tokens_per_expert.tolist() for index, moe in self._layers.items() if self._watches}
        loss = result.losses["cross_entropy"]
        seen = partial(Signs, step, loss, result.grad_norm, learning_rate, self._update, residuals, loads)
        signs = self._crew.share(seen) if self._watches else seen()  # all processes must come to the same judgement
        return self.watch.observe(signs, self._losses_now)

    def update(self) -> None:
        """Take the step of the optimizers."""
        self._updates.before()
        for optimizer in self._parts.optimizers:
            optimizer.step()
        self._update = self._updates.after()

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {
            "watch": {**self.watch.state(), "update": self._update},
            "course": self.course.turns,
            "rollbacks": self.rollbacks,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as a checkpoint says; one that was written without a watch says nothing."""
        if "watch" in state:
            self.watch.restore(state["watch"])
            self._update = float(state["watch"]["update"])
            self.course.turns = [(int(start), int(ahead)) for start, ahead in state["course"]]
            self.rollbacks = int(state["rollbacks"])

    def _losses_now(self, steps: Sequence[int]) -> list[float]:
        return [self._loss_now(self.course.batch_after(step - 1)) for step in steps]

    def _loss_now(self, batch: int) -> float:
        """The loss of an earlier batch, by the present weights."""
        parts, windows = self._parts, self._batches.batch(batch)
        if not bool((windows[1] != IGNORED).any()):
            return math.nan
        settings: dict[str, Any] = {"batch_size": parts.placement.micro_batch, "autocast": parts.autocast}
        loss = evaluate(parts.model, windows, **settings, step=0, bytes_per_token=1.0, context=self._context).loss
        self._crew.evaluated(parts.model)
        return loss
