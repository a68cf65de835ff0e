"""The public plan: the best layout of a model on a machine, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.plan import explain
from zoo.plan.estimate import Estimate, estimate
from zoo.plan.layout import Layout, Points
from zoo.plan.legal import check
from zoo.plan.question import DEGREES, RESERVE, Question, ask
from zoo.plan.search import Found, search
from zoo.spec.base import ConfigError
from zoo.spec.hardware import HardwareSpec
from zoo.spec.model import ModelSpec

if TYPE_CHECKING:
    from zoo.plan.sensitivity import Sensitivity


@dataclass(frozen=True)
class Plan:
    """The quickest layout that fits, beside everything that it was chosen from."""

    question: Question
    best: Estimate
    runner_up: Estimate | None
    """The best that divides the model in another way; None where there is no other."""
    found: Found
    """All that was priced, in the precision of `best`."""
    tried: tuple[Found, ...]
    """The same for every precision that was asked for."""

    @property
    def model(self) -> str:
        return self.best.model

    @property
    def hardware(self) -> str:
        return self.best.hardware

    @property
    def layout(self) -> Layout:
        return self.best.layout

    @property
    def micro_batch(self) -> int:
        return self.best.micro_batch

    @property
    def recompute(self) -> str:
        return self.best.recompute

    @property
    def precision(self) -> str:
        return self.best.precision

    @property
    def step_time_s(self) -> float:
        return self.best.step_time_s

    @property
    def tokens_per_s_per_device(self) -> float:
        return self.best.tokens_per_s_per_device

    @property
    def mfu(self) -> float:
        return self.best.mfu

    @property
    def memory_gib(self) -> dict[str, float]:
        """By component."""
        return dict(self.best.memory_gib)

    @cached_property
    def reasons(self) -> list[str]:
        """What the step is spent on, what the runner-up loses, and what a quicker layout would need."""
        return explain.reasons(self.best, self.runner_up, self.found)

    @cached_property
    def limits(self) -> list[explain.Limit]:
        """What runs out when something grows; the first to do so comes first."""
        return explain.limits(self.found, 0, self.best)

    def top(self, number: int = 10) -> list[Estimate]:
        """The best layouts that fit, best first."""
        return [priced_row(self.found, row) for row in range(min(number, self.found.num_fitting))]

    def why_not(self, layout: Layout, *, micro_batch: int | None = None, recompute: str | None = None) -> str:
        """Why a layout was not chosen: a rule that it breaks, memory that it lacks, or time that it loses.

        Args:
            layout: Searched or not.
            micro_batch: Absent: the best for this layout.
            recompute: Absent: the best for this layout.
        """
        q, n = self.question, self.question.machine.num_devices
        if layout.num_devices != n:
            return f"{layout}: not legal: tp * cp * pp * dp is {layout.num_devices}, there are {n} devices"
        try:
            points = Points.of([layout], seq_len=q.seq_len, global_batch=q.global_batch, micro_batch=micro_batch or 1)
            check(q.spec, points, uneven_stages=True)
        except ConfigError as error:
            return f"{layout}: not legal: {'; '.join(str(error).replace('layout: ', '').splitlines())}"
        fixed = {name: getattr(layout, name) for name in DEGREES}
        if micro_batch is not None:
            fixed["micro_batch"] = micro_batch
        kept = q.recomputes if recompute is None else (recompute,)
        found = search(replace(q, fixed=fixed, recomputes=kept), self.precision)
        row = 0 if found.num_fitting else int(np.argmin(found.memory_gib))
        return explain.why_not(found, priced_row(found, row), self.best)

    def sensitivity(self) -> Sensitivity:
        """How much the step time would change with each resource of the machine, planned anew every time."""
        from zoo.plan.sensitivity import sensitivity

        return sensitivity(self)

    def to_dict(self) -> dict[str, Any]:
        """What was found, for programs."""
        best = self.best
        facts = ("model", "hardware", "engine", "num_devices", "seq_len", "global_batch", "micro_batch", "precision")
        times = ("recompute", "step_time_s", "tokens_per_s_per_device", "mfu", "memory_limit_gib", "fits")
        return {
            **{name: getattr(best, name) for name in (*facts, *times)},
            "layout": {name: getattr(best.layout, name) for name in DEGREES},
            "memory_gib": dict(best.memory_gib),
            "time_s": dict(best.time_s),
            "reasons": self.reasons,
            "limits": explain.in_words(self.limits),
            "layouts": {"legal": self.found.num_legal, "priced": len(self.found), "fit": self.found.num_fitting},
        }

    def __str__(self) -> str:
        from zoo.plan.report import text_of

        return text_of(self)

    __repr__ = __str__


def priced_row(found: Found, row: int) -> Estimate:
    """The whole estimate of a layout that was found."""
    q = found.question
    return estimate(
        q.spec,
        q.machine,
        layout=found.layout(row),
        micro_batch=found.micro_batch(row),
        recompute=found.recompute(row),
        precision=found.precision,
        **q.estimate_options(),
    )


def plan(
    model: str | ModelSpec,
    hardware: str | HardwareSpec,
    *overrides: str,
    seq_len: int | None = None,
    global_batch: int | None = None,
    micro_batch: int | None = None,
    precision: str | Sequence[str] | None = None,
    recompute: str | None = None,
    tp: int | None = None,
    pp: int | None = None,
    vp: int | None = None,
    cp: int | None = None,
    ep: int | None = None,
    etp: int | None = None,
    dp: int | None = None,
    shard: int | None = None,
    engine: str | None = None,
    optimizer: str = "adamw",
    mtp: bool | None = None,
    routing: str = "balanced",
    graphs: str | None = None,
    reserve: float = RESERVE,
) -> Plan:
    """Find the quickest layout of a training step that fits into a machine.

    Args:
        model: A name (`zoo.list_models()`) or a description.
        hardware: A name (`zoo.list_hardware()`) or a description; all of its devices are used.
        overrides: Changes, as on the command line: `"hardware.num_devices=256"`, `"hardware.chip.memory_gib=288"`.
        seq_len: Tokens of a sequence; absent: 4096, or the model's context where that is shorter.
        global_batch: Sequences of a step; absent: by the size of the model (`zoo.plan.question.default_batch`).
        micro_batch: Sequences that a replica works on at once; absent: searched.
        precision: One, or several to choose from; absent: the one of the machine's profile.
        recompute: As in `zoo.estimate`; absent: searched.
        tp, pp, vp, cp, ep, etp, dp, shard: Degrees of a `Layout` that are given; those absent are searched.
        engine: As in `zoo.estimate`, and so are `optimizer`, `mtp`, `routing` and `graphs`.
        reserve: The part of the memory that has to stay free (an estimate's `fits` asks for none).

    Raises:
        ConfigError: something is unknown, no layout is legal, or none fits; the message says what is nearest.
    """
    degrees = {"tp": tp, "pp": pp, "vp": vp, "cp": cp, "ep": ep, "etp": etp, "dp": dp, "shard": shard}
    question = ask(
        model,
        hardware,
        overrides,
        seq_len=seq_len,
        global_batch=global_batch,
        precision=precision,
        recompute=recompute,
        fixed={**degrees, "micro_batch": micro_batch},
        engine=engine,
        optimizer=optimizer,
        mtp=mtp,
        routing=routing,
        graphs=graphs,
        reserve=reserve,
    )
    return answer(question)


def answer(question: Question) -> Plan:
    """The plan for a question.

    Raises:
        ConfigError: no layout is legal, or none fits.
    """
    tried = tuple(search(question, precision) for precision in question.precisions)
    fitting = [found for found in tried if found.num_fitting]
    if not fitting:
        from zoo.plan.advice import nowhere

        raise ConfigError(nowhere(question, tried))
    found = min(fitting, key=lambda one: float(one.seconds[0]))
    row = _runner_up(found)
    return Plan(question, priced_row(found, 0), None if row is None else priced_row(found, row), found, tried)


def _runner_up(found: Found) -> int | None:
    """The best row that divides the model in another way than the first does.

    Interleaving, and devices that share long sequences instead of working on several short ones, do not count: they
    cost the same to the last percent.
    """
    same = np.ones(len(found), dtype=np.bool_)
    for name in set(DEGREES) - {"vp", "cp", "dp"}:
        same &= found.table[name] == found.table[name][0]
    others = np.flatnonzero(~same & found.fits)
    return int(others[0]) if len(others) else None
