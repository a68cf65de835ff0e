"""The watch: it names what goes wrong, stays quiet otherwise, and a run that may go back does."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from benchmarks import alerts
from tests.train.runs import Listener, small_run
from zoo.spec.watch import WatchSpec
from zoo.train import loop
from zoo.train.detectors import Signs
from zoo.train.display import LiveDisplay, PlainDisplay
from zoo.train.errors import TrainingError
from zoo.train.events import Alerted, RolledBack
from zoo.train.gauges import ResidualGauge, UpdateGauge
from zoo.train.guard import Course
from zoo.train.metrics_file import MetricsFile, read_metrics
from zoo.train.signals import StopSignal
from zoo.train.watch import Watch

TOP_K = {1: 2}


pytestmark = pytest.mark.usefixtures("known_machine")


def healthy(num_steps: int, seed: int = 0) -> Iterator[Signs]:
    """Numbers as those of a run that goes well."""
    draw = np.random.default_rng(seed)
    for step in range(1, num_steps + 1):
        noise = draw.normal(size=4).tolist()
        yield Signs(
            step=step,
            loss=2.0 + 3.5 * math.exp(-step / 25) + 0.12 * noise[0],
            grad_norm=(0.5 + 2 * math.exp(-step / 25)) * math.exp(0.3 * noise[1]),
            learning_rate=1e-3,
            update=0.02 * math.exp(0.1 * noise[2]),
            residuals=(0.02 + 0.01 * step, 0.02 + 0.02 * step),
            loads={1: draw.multinomial(512, draw.dirichlet(np.full(8, 20.0))).tolist()},
        )


def watched(steps: Sequence[Signs], watch: Watch | None = None, losses_now: float | None = None) -> list[Alerted]:
    """What is told of steps. Earlier text is predicted with a loss of `losses_now`; None: as before."""
    watch = watch or Watch(WatchSpec(), 1.0, TOP_K)
    losses = {signs.step: signs.loss for signs in steps}

    def recheck(earlier: Sequence[int]) -> list[float]:
        return [losses[step] if losses_now is None else losses_now for step in earlier]

    return [alert for signs in steps for alert in watch.observe(signs, recheck)]


def changed(steps: Sequence[Signs], first: int, **changes: Any) -> list[Signs]:
    """Steps from the `first` on with other values; a function gets the value and the steps since."""

    def new(signs: Signs) -> Signs:
        values = {
            name: value(getattr(signs, name), signs.step - first) if callable(value) else value
            for name, value in changes.items()
        }
        return dataclasses.replace(signs, **values)

    return [new(signs) if signs.step >= first else signs for signs in steps]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_healthy_numbers_are_not_told(seed: int) -> None:
    assert watched(list(healthy(300, seed))) == []


FAILURES: dict[str, tuple[dict[str, Any], float | None]] = {
    "bad_data": ({"loss": lambda loss, since: loss + 3, "grad_norm": lambda norm, since: 30 * norm}, None),
    "loss_spike": ({"loss": lambda loss, since: loss + 3}, 5.0),
    "lr_blowup": ({"loss": lambda loss, since: loss + 3, "update": 0.4}, 5.0),
    "gradient_explosion": ({"grad_norm": lambda norm, since: 15 * norm + 10}, None),
    "residual_growth": ({"residuals": lambda sizes, since: tuple(1.2**since * size for size in sizes)}, None),
    "router_collapse": ({"loads": {1: [250, 240, 12, 10, 0, 0, 0, 0]}}, None),
}


@pytest.mark.parametrize("first", [70, 150])
@pytest.mark.parametrize("name", FAILURES)
def test_what_goes_wrong_is_named(name: str, first: int) -> None:
    changes, losses_now = FAILURES[name]
    told = watched(changed(list(healthy(first + 60)), first, **changes), losses_now=losses_now)
    assert {alert.name for alert in told} == {name}
    assert told[0].step < first + 20
    assert told[0].since <= told[0].step


def test_text_that_became_too_easy_is_strange_too() -> None:
    steps = changed(list(healthy(140)), 100, loss=lambda loss, since: 0.1 * loss)
    assert [alert.name for alert in watched(steps)] == ["bad_data"]
    assert watched(steps, losses_now=0.2) == []  # then the model has learned something


def test_one_strange_step_is_noise() -> None:
    steps = list(healthy(140))
    steps[100] = dataclasses.replace(steps[100], loss=9.0, grad_norm=90.0, residuals=(50.0, 50.0))
    assert watched(steps) == []


def test_a_run_that_is_worse_than_at_its_start_is_diverging() -> None:
    steps = changed(list(healthy(20)), 5, loss=lambda loss, since: 6 + since, update=3.0)
    assert [alert.name for alert in watched(steps, losses_now=9.0)] == ["lr_blowup"]
    assert watched(steps, losses_now=9.0)[0].step < 10


def test_the_same_is_not_told_again_for_a_while() -> None:
    steps = changed(list(healthy(320)), 100, loads=FAILURES["router_collapse"][0]["loads"])
    told = watched(steps)
    assert [alert.step - told[0].step for alert in told] == [0, 100, 200]


def test_nothing_is_watched_when_that_is_not_wanted() -> None:
    steps = changed(list(healthy(140)), 100, loss=50.0)
    assert watched(steps, Watch(WatchSpec(alerts=False), 1.0, TOP_K)) == []


@pytest.mark.parametrize("cut", [10, 101, 103])
def test_a_watch_goes_on_where_it_was(cut: int) -> None:
    changes, losses_now = FAILURES["lr_blowup"]
    steps = changed(list(healthy(160)), 100, **changes)
    first, second = Watch(WatchSpec(), 1.0, TOP_K), Watch(WatchSpec(), 1.0, TOP_K)
    before = watched(steps[:cut], first, losses_now)
    second.restore(json.loads(json.dumps(first.state())))
    assert before + watched(steps[cut:], second, losses_now) == watched(steps, None, losses_now)


def test_skipped_steps_are_counted() -> None:
    watch = Watch(WatchSpec(max_skipped=2), 1.0, TOP_K)
    assert [alert.name for alert in watch.skipped(5, "the loss is nan")] == ["nonfinite"]
    assert watch.skipped(6, "the loss is nan") == []  # told already
    assert not watch.calm(6)
    watch.skipped(106, "the loss is nan")  # the first two are long ago
    watch.skipped(107, "the loss is nan")
    with pytest.raises(TrainingError, match=r"^step 108: the loss is inf; 3 of the last 100 steps were skipped"):
        watch.skipped(108, "the loss is inf")


def test_gauges_measure_what_they_say() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 6)])
    gauge, x = ResidualGauge(layers), torch.randn(3, 4)
    first = layers[0](x)
    layers[1](first)
    layers[0](100 * x)  # a second micro-batch
    expected = [first.square().mean().sqrt(), layers[1](first).square().mean().sqrt()]
    assert gauge.read() == pytest.approx([value.item() for value in expected])
    layers.eval()
    layers[0](x)
    assert gauge.read() == ()
    update = UpdateGauge(layers.parameters())
    update.before()
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter *= 1.25
    assert update.after() == pytest.approx(0.25)
    assert UpdateGauge([]).after() == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), max_size=5))
def test_a_run_that_goes_back_reads_on(turns: list[tuple[int, int]]) -> None:
    course, step, newest = Course(), 0, -1
    for back, forward in turns:
        read = [course.batch_after(each) for each in range(step, step + forward)]
        assert read == list(range(newest + 1, newest + 1 + forward))  # no batch twice, none left out
        newest, from_step = read[-1], step + forward
        step = max(0, from_step - back)
        course.turn(step, from_step)


@pytest.mark.parametrize("name", alerts.PLANTED)
def test_planted_failures_are_named_in_time(name: str, tmp_path: Path) -> None:
    told = {alert.name: alert for alert in alerts.planted_alerts(name, tmp_path)}
    assert alerts.PLANTED_AFTER < told[name].step <= alerts.PLANTED_AFTER + alerts.BAR


@pytest.mark.parametrize("name", ["experts, Muon", "experts, AdamW, constant rate 1e-2"])
def test_healthy_runs_are_quiet(name: str, tmp_path: Path) -> None:
    assert alerts.alerts_of(alerts.run_of(*alerts.HEALTHY[name], steps=120), tmp_path) == []


def test_people_see_what_is_told(made_up_run: Callable[..., Iterator[Any]]) -> None:
    alert = Alerted(30, "bad_data", "look at the batches of steps 28 to 30", 28)
    back = RolledBack(10, 30, "bad_data", "on from step 10")
    plain, drawn = io.StringIO(), io.StringIO()
    for display in (PlainDisplay(10, plain), LiveDisplay(Console(file=drawn, width=80, force_terminal=True))):
        display.started(next(made_up_run()))
        display.alerted(alert)
        display.rolled_back(back)
        display.close()
    assert "step 30/60  ALERT bad_data: look at the batches of steps 28 to 30\n" in plain.getvalue()
    assert "step 10/60  ROLLED BACK: on from step 10\n" in plain.getvalue()
    assert "alert bad_data" in drawn.getvalue()
    assert "rolled back" in drawn.getvalue()


class Planted(loop.Session):
    """A session that some batches, counted from 1, give gradients that are no numbers."""

    broken: frozenset[int] = frozenset()

    def _train_step(self) -> list[Alerted]:
        if self.guard.course.batch_after(self.step) + 1 in self.broken:
            weight = self.parts.model.layers[0].mixer.out.weight
            handle = weight.register_hook(lambda grad: (handle.remove(), grad * math.nan)[1])
        return super()._train_step()


def train(folder: Path, broken: frozenset[int], *overrides: str) -> tuple[Listener, Planted]:
    listener, metrics = Listener(), MetricsFile(folder / "run/metrics.jsonl")
    session = Planted(small_run(folder, *overrides), folder / "run", [metrics, listener])
    session.broken = broken
    with StopSignal() as stop:
        session.run_until(stop)
    metrics.close()
    return listener, session


def test_a_broken_step_is_not_taken(tmp_path: Path) -> None:
    before: dict[str, Any] = {}

    class Looking(Planted):
        def _train_step(self) -> list[Alerted]:
            weights = [parameter.detach().clone() for parameter in self.parts.model.parameters()]
            told = super()._train_step()
            same = all(map(torch.equal, weights, self.parts.model.parameters()))
            before[f"step {self.step}"] = same
            return told

    listener = Listener()
    session = Looking(small_run(tmp_path), tmp_path / "run", [listener])
    session.broken = frozenset({2, 4})
    with StopSignal() as stop:
        session.run_until(stop)
    assert [step.skipped for step in listener.steps] == [False, True, False, True, False, False]
    assert list(before.values()) == [False, True, False, True, False, False]
    assert [(alert.step, alert.name) for alert in listener.alerts] == [(2, "nonfinite")]
    # Each report covers 3 steps of 64 tokens with two choices; those of steps that were not taken do not count.
    assert [sum(health.load) for step in listener.steps for health in step.routing] == [256, 256, 256, 256]


def test_a_run_goes_back_and_on_with_other_text(tmp_path: Path) -> None:
    rollback = ("train.watch.rollbacks=1", "checkpoint.every=4", "train.steps=24")
    listener, session = train(tmp_path, frozenset({14}), *rollback)
    (alert,), (back,) = listener.alerts, listener.rollbacks
    assert (alert.name, alert.step) == ("nonfinite", 14)
    assert (back.step, back.from_step, back.alert) == (8, 14, "nonfinite")
    assert [step.step for step in listener.steps] == [*range(1, 15), *range(9, 25)]
    assert session.guard.course.batch_after(9) == 15
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [record["step"] for record in records if record["event"] == "step"] == list(range(1, 25))
    assert [record["from_step"] for record in records if record["event"] == "rolled_back"] == [14]
    state = json.loads((tmp_path / "run/checkpoints/step_000024/state.json").read_text())
    assert state["guard"]["rollbacks"] == 1


def test_going_back_has_an_end_and_needs_a_place(tmp_path: Path) -> None:
    listener, _ = train(tmp_path, frozenset({3}), "train.watch.rollbacks=1")
    assert [alert.name for alert in listener.alerts] == ["nonfinite", "no_rollback"]
    assert listener.rollbacks == []
    assert "no good checkpoint from before step 3" in listener.alerts[1].message
