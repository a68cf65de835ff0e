"""Time and memory of many layouts of one model on one machine at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zoo.plan.engine import Engine, Facts, facts_of, reach_of
from zoo.plan.layout import Array, Mask, Points
from zoo.plan.legal import mixtures
from zoo.plan.memory import STATE_BYTES, Storage, memory_of, total
from zoo.plan.products import uses_of
from zoo.plan.step import Step, step_of
from zoo.plan.work import Work, work_of
from zoo.spec.base import ConfigError, near
from zoo.spec.hardware import HardwareSpec
from zoo.spec.model import ModelSpec

CONTEXT_GIB = 0.75
"""Of the driver, kernels and communicators, beside what is allocated."""
ROOMY_GIB = 170.0
"""Memory of chips on which engines capture whole iterations, which takes room for every buffer at once."""


@dataclass(frozen=True)
class Run:
    """How a model is run, apart from its layout."""

    precision: str = "bf16"
    optimizer: str = "adamw"
    mtp: bool = False
    """Multi-token prediction is trained along."""
    balanced: bool = True
    """Every expert gets as many tokens as any other."""
    graphs: int = 0
    """As `step_of` takes them."""

    def __post_init__(self) -> None:
        if self.optimizer not in STATE_BYTES:
            hint = near(self.optimizer, STATE_BYTES) or f"allowed: {', '.join(STATE_BYTES)}"
            raise ConfigError(f"optimizer: found {self.optimizer!r}; {hint}")


@dataclass(frozen=True)
class Prices:
    """What layouts cost, as arrays [n]."""

    work: Work
    facts: Facts
    step: Step
    seconds: Array
    """Of a step."""
    tokens_per_s: Array
    """On one device."""
    memory_gib: dict[str, Array]
    """By component."""
    total_gib: Array
    fits: Mask
    """Where all of it has room in the memory of the chip; everywhere if that is not known."""


def price(spec: ModelSpec, hardware: HardwareSpec, points: Points, run: Run, engine: Engine) -> Prices:
    """Price layouts, legal or not.

    Raises:
        ConfigError: the precision is unknown, or the chip lacks a number that it needs.
    """
    facts = facts_of(hardware, run.precision, reach_of(hardware.chip))
    work = work_of(spec, points, mtp=run.mtp, balanced=run.balanced)
    settings = {"fused": engine.fused_attention, "grad_bytes": engine.grad_bytes, "graphs": float(run.graphs)}
    step = step_of(work, points, facts, engine.constants, **settings)  # type: ignore[arg-type]
    seconds = step.total
    memory = memory_of(spec, points, storage_of(engine, run, facts), mtp=run.mtp)
    memory["workspace"] = np.full(len(points), CONTEXT_GIB)
    gib, room = total(memory), hardware.chip.memory_gib or np.inf
    return Prices(work, facts, step, seconds, work.tokens / seconds, memory, gib, gib <= room)


def storage_of(engine: Engine, run: Run, facts: Facts) -> Storage:
    """What an engine keeps in which dtype."""
    moments = STATE_BYTES[run.optimizer]
    if facts.bits >= 32:
        return Storage(0.0, 4.0, 4.0, moments, 4.0, 8.0, fused_attention=engine.fused_attention)
    activation = 2.0 if facts.bits >= 16 else 1.5  # half of what is kept goes into narrow products
    return Storage(
        gradient=engine.gradient, moments=moments, activation=activation, fused_attention=engine.fused_attention
    )


def graphs_of(engine: Engine, spec: ModelSpec, hardware: HardwareSpec) -> int:
    """What an engine captures where nothing else is said.

    Whole iterations only where there is room for them, for mixtures of experts, which gain most, on attention alone.
    """
    attends = all("scores" in use.cost.mixing(2, True) for use in uses_of(spec, False) if use.is_mixer)
    roomy = (hardware.chip.memory_gib or 0.0) >= ROOMY_GIB
    whole = bool(mixtures(spec)) and attends and roomy
    return min(engine.graphs, 2 if whole else 1)
