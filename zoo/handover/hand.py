"""The run that is handed over: the quickest plan that the target can express, and who decided each of its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zoo.plan.advice import nowhere
from zoo.plan.estimate import Estimate
from zoo.plan.layout import Layout
from zoo.plan.plan import priced_row
from zoo.plan.question import DEGREES, Question, ask
from zoo.plan.search import Found, search
from zoo.plan.wording import seconds
from zoo.spec.base import ConfigError
from zoo.spec.model import ModelSpec

MOST_ROWS = 2000
"""Layouts of one search that are looked at, best first."""


@dataclass(frozen=True)
class Target:
    """What a target can express of a plan."""

    name: str
    recomputes: Callable[[ModelSpec, str], bool]
    """Whether it can compute again of a model what a setting of the planner names."""
    precisions: Sequence[str]
    objection: Callable[[Question, Layout, int], str | None] = lambda question, layout, micro_batch: None
    """Why a layout with a micro-batch cannot be expressed; None where it can."""
    pins: Callable[[Question], Sequence[Mapping[str, int]]] = lambda question: ({},)
    """Degrees that its layouts have in common, for each search that may find one."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Options of the plan where the user gives none."""


@dataclass(frozen=True)
class Hand:
    """A run as it was planned, and what of it was given."""

    target: str
    names: Mapping[str, str]
    """Of `model` and `hardware`."""
    overrides: tuple[str, ...]
    options: Mapping[str, Any]
    """Of the plan, as the user gave them."""
    question: Question
    best: Estimate

    @property
    def layout(self) -> Layout:
        return self.best.layout

    @property
    def mtp(self) -> bool:
        """Blocks of multi-token prediction are trained."""
        q = self.question
        return q.run(self.best.precision, q.engine_for(self.layout.shard > 1)).mtp

    def origin(self, name: str) -> str:
        """Who decided a number of the plan, or `num_devices`."""
        if name in self.options or any(word.lstrip("+").startswith(f"hardware.{name}=") for word in self.overrides):
            return "user"
        if name in ("seq_len", "global_batch", "optimizer", "mtp"):
            return f"plan's default{' for the model' if name != 'optimizer' else ''}"
        if name in ("precision", "num_devices"):
            return f"hardware {self.names['hardware']}"
        return "plan"

    def summary(self) -> Iterator[str]:
        """What was planned, in a few lines."""
        best, chip = self.best, self.question.machine.chip
        yield f"{best.model} on {best.num_devices} x {chip.name}, {best.layout}"
        limit = f" of {best.memory_limit_gib:.1f}" if best.memory_limit_gib else ""
        speed = f"{seconds(best.step_time_s)} a step, {best.tokens_per_s_per_device:,.0f} tokens/s a device"
        yield f"planned: {speed}, MFU {best.mfu:.1%}, {best.total_memory_gib:.1f}{limit} GiB ({best.engine})"


def hand_over(target: Target, model: str, hardware: str, overrides: Sequence[str], options: Mapping[str, Any]) -> Hand:
    """Plan a run for a target.

    Args:
        target: Who runs it.
        model: Its name.
        hardware: The name of a machine.
        overrides: Changes of either, as on the command line.
        options: What else `zoo.plan.plan.plan` takes, as far as it was given.

    Raises:
        ConfigError: something is unknown, nothing fits, or the target cannot express any layout that does.
    """
    question = _question(target, model, hardware, overrides, options)
    tried = [
        search(replace(question, fixed={**question.fixed, **pins}), precision)
        for pins in target.pins(question)
        for precision in question.precisions
    ]
    rows = [(float(found.seconds[row]), found, row) for found in tried for row in _expressible(target, found)]
    if not rows:
        raise ConfigError(_why_none(target, question, tried))
    _, found, row = min(rows, key=lambda one: one[0])
    names = {"model": model, "hardware": hardware}
    return Hand(target.name, names, tuple(overrides), dict(options), question, priced_row(found, row))


def _question(
    target: Target, model: str, hardware: str, overrides: Sequence[str], options: Mapping[str, Any]
) -> Question:
    kept = {**target.defaults, **options}
    fixed = {name: kept.pop(name, None) for name in (*DEGREES, "micro_batch")}
    question = ask(model, hardware, overrides, fixed=fixed, **kept)
    for precision in question.precisions:
        if precision not in target.precisions:
            allowed = ", ".join(target.precisions)
            raise ConfigError(f"precision: found {precision!r}; {target.name} has {allowed}")
    possible = tuple(name for name in question.recomputes if target.recomputes(question.spec, name))
    if not possible:
        raise ConfigError(f"recompute: found {options['recompute']!r}; {target.name} cannot compute again just that")
    return replace(question, recomputes=possible)


def _expressible(target: Target, found: Found) -> list[int]:
    """The first row that fits and that the target can express, if there is one."""
    for row in range(min(found.num_fitting, MOST_ROWS)):
        if target.objection(found.question, found.layout(row), found.micro_batch(row)) is None:
            return [row]
    return []


def _why_none(target: Target, question: Question, tried: Sequence[Found]) -> str:
    fitting = [found for found in tried if found.num_fitting]
    if not fitting:
        return nowhere(question, tuple(tried))
    found = min(fitting, key=lambda one: float(one.seconds[0]))
    layout, micro_batch = found.layout(0), found.micro_batch(0)
    why = target.objection(found.question, layout, micro_batch)
    return f"layout: found {layout} with micro_batch={micro_batch}; {target.name} cannot express it: {why}"
