"""A made-up run, as the training loop would tell it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zoo.train.events import Evaluated, LayerHealth, Reporter, RunFinished, RunStarted, StepDone
from zoo.train.routing import layer_health

Event = RunStarted | StepDone | Evaluated | RunFinished


def run_events(
    run_dir: Path,
    num_steps: int = 60,
    first_step: int = 0,
    last_step: int | None = None,
    num_layers: int = 3,
    num_experts: int = 8,
    log_every: int = 10,
    eval_every: int = 20,
) -> Iterator[Event]:
    """A run whose loss falls and whose routing evens out; every number is a pure function of its step.

    With `num_layers=0` the model is dense. In the last layer the last expert never gets a token.
    """
    yield _started(run_dir, num_steps, first_step)
    evaluation = None
    last_step = last_step or num_steps
    for step in range(first_step + 1, last_step + 1):
        routing = _routing(step, num_layers, num_experts) if step % log_every == 0 else ()
        yield _step(step, routing)
        if step % eval_every == 0:
            evaluation = Evaluated(step=step, loss=_loss(step), bits_per_byte=_bits(step), num_tokens=4096, time_s=0.5)
            yield evaluation
    yield RunFinished(
        step=last_step,
        num_steps=num_steps,
        reason="done" if last_step == num_steps else "interrupted",
        train_time_s=0.25 * (last_step - first_step),
        last_eval=evaluation,
        baselines={"order-2 bytes": 2.655},
        sample="__init__(self, path):\n    return [bold]self.path\x1b[31m\n",
        files=(run_dir / "metrics.jsonl", run_dir / "loss_curve.png"),
        sample_prompt="def ",
    )


def _started(run_dir: Path, num_steps: int, first_step: int) -> RunStarted:
    return RunStarted(
        run_dir=run_dir,
        model_name="tiny_moe",
        num_params=1_063_424,
        num_active_params=412_160,
        hardware="2 cores of a CPU, matrix multiplication at 0.12 TFLOP/s in fp32 (measured)",
        choices=(
            "precision fp32: this CPU multiplies bf16 matrices no faster",
            "experts grouped: faster than the loop from 4 experts on",
        ),
        corpus="the standard library of Python 3.11, 10.4 MB in 1,312 files, 1.0 MB of it held out",
        num_steps=num_steps,
        first_step=first_step,
        tokens_per_step=4096,
        baselines={"order-2 bytes": 2.655},
    )


def _bits(step: int) -> float:
    return 1.9 + 6.1 * math.exp(-step / 12)


def _loss(step: int) -> float:
    return _bits(step) * math.log(2)


def _step(step: int, routing: tuple[LayerHealth, ...]) -> StepDone:
    noise = random.Random(step).uniform(0.96, 1.04)
    return StepDone(
        step=step,
        loss=_loss(step) * noise,
        losses={"cross_entropy": _loss(step) * noise, "balance": 1.0 + 1 / step},
        bits_per_byte=_bits(step) * noise,
        learning_rate=1e-3,
        grad_norm=noise,
        step_time_s=0.25,
        tokens_per_s=16_384.0,
        mfu=0.312,
        routing=routing,
    )


def _routing(step: int, num_layers: int, num_experts: int) -> tuple[LayerHealth, ...]:
    layers = []
    for layer in range(num_layers):
        draw = random.Random(1000 * step + layer)
        load = [round(1000 * draw.uniform(1, 1.4 + 20 / step)) for _ in range(num_experts)]
        load[-1] = 0 if layer == num_layers - 1 else load[-1]
        layers.append(layer_health(layer, load))
    return tuple(layers)


def send(reporter: Reporter, events: Iterator[Event]) -> None:
    """Hand the events to the methods that they are for, as the training loop does."""
    for event in events:
        match event:
            case RunStarted():
                reporter.started(event)
            case StepDone():
                reporter.step_done(event)
            case Evaluated():
                reporter.evaluated(event)
            case RunFinished():
                reporter.finished(event)


@pytest.fixture
def made_up_run(tmp_path: Path) -> Callable[..., Iterator[Event]]:
    """`run_events` in a temporary run directory."""

    def events(**changes: Any) -> Iterator[Event]:
        return run_events(tmp_path, **changes)

    return events


@pytest.fixture
def feed() -> Callable[[Reporter, Iterator[Event]], None]:
    """Sends events to a reporter."""
    return send
