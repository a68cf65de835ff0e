"""What a better machine would bring: the step time against each of its resources, planned anew for every change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from zoo.plan.checkpoints import checkpoints
from zoo.plan.layout import Layout
from zoo.plan.price import price
from zoo.plan.question import Question
from zoo.plan.search import Found, Table, families, points_of, search
from zoo.spec.hardware import HardwareSpec, PeakSpec

if TYPE_CHECKING:
    from zoo.plan.plan import Plan

STEP = 0.1
"""Resources are changed by this part, up and down; sizes, which do nothing until a layout changes, by SIZES."""
SIZES = (0.5, 2.0)


@dataclass(frozen=True)
class Change:
    """A machine with one resource changed, and the best step on it."""

    factor: float
    step_time_s: float
    """Planned anew; endless where nothing fits any more."""
    layout: Layout | None
    moved: bool
    """Another layout than that of the plan is the best."""


@dataclass(frozen=True)
class Effect:
    """What one resource does."""

    resource: str
    value: str
    """What the machine has of it; empty where it is not known."""
    fewer: Change | None
    more: Change | None
    """Absent where the resource is not known, or there is none."""
    elasticity: float
    """Percent of step time for each percent of the resource; -1: time halves when it doubles. NaN: not known."""
    fixed_elasticity: float
    """The same with the layout of the plan kept."""
    note: str = ""


@dataclass(frozen=True)
class Sensitivity:
    """The effects of all resources, the strongest first."""

    step_time_s: float
    effects: tuple[Effect, ...]


Changed = Callable[[HardwareSpec, float], HardwareSpec]


def _compute(machine: HardwareSpec, factor: float) -> HardwareSpec:
    peaks = {name: value * factor for name, value in machine.chip.tflops.to_dict().items() if value is not None}
    # Power grows along: a chip that computes more at the same power would only throttle.
    power = machine.chip.power_w
    return machine.replace(
        chip=machine.chip.replace(tflops=PeakSpec(**peaks), power_w=power and power * factor, marks={})
    )


def _memory_size(machine: HardwareSpec, factor: float) -> HardwareSpec:
    gib = machine.chip.memory_gib
    return machine.replace(chip=machine.chip.replace(memory_gib=gib and gib * factor, marks={}))


def _memory_speed(machine: HardwareSpec, factor: float) -> HardwareSpec:
    speed = machine.chip.memory_gb_s
    return machine.replace(chip=machine.chip.replace(memory_gb_s=speed and speed * factor, marks={}))


def _links(machine: HardwareSpec, factor: float) -> HardwareSpec:
    link = machine.chip.scale_up
    faster = link.replace(gb_s=link.gb_s and link.gb_s * factor)
    return machine.replace(chip=machine.chip.replace(scale_up=faster, marks={}))


def _network(machine: HardwareSpec, factor: float) -> HardwareSpec:
    speed = machine.scale_out_gbit_s
    return machine.replace(scale_out_gbit_s=speed and speed * factor)


def _domain(machine: HardwareSpec, factor: float) -> HardwareSpec:
    return machine.replace(domain_size=max(1, round(machine.domain_size * factor)))


def sensitivity(plan: Plan) -> Sensitivity:
    """The effect of every resource on the step time of a plan."""
    q = replace(plan.question, precisions=(plan.precision,))
    machine = q.machine
    chip, several = machine.chip, machine.num_devices > 1
    plain = families(q)
    small, large = (1 - STEP, 1 + STEP), SIZES
    far = machine.num_devices > machine.domain_size
    no_links = "" if chip.scale_up.gb_s else "not stated"
    absent = {"links": no_links if several else "one device", "network": "" if far else "all in one domain"}
    known = {"links": several and not no_links, "network": far and bool(machine.scale_out_gbit_s)}
    effects = [
        _effect(plan, q, plain, "compute", _tflops(plan), _compute, small),
        _effect(plan, q, plain, "memory bandwidth", _unit(chip.memory_gb_s, "GB/s"), _memory_speed, small),
        _effect(plan, q, plain, "memory size", _unit(chip.memory_gib, "GiB"), _memory_size, large),
        _effect(plan, q, plain, "fast-domain links", _unit(chip.scale_up.gb_s, "GB/s"), _links, small)
        if known["links"]
        else _unknown("fast-domain links", absent["links"]),
        _effect(plan, q, plain, "network", _unit(machine.scale_out_gbit_s, "Gbit/s"), _network, small)
        if known["network"]
        else _unknown("network", absent["network"] or "not stated"),
        _effect(plan, q, None, "domain size", f"{machine.domain_size} devices", _domain, large)
        if several
        else _unknown("domain size", "one device"),
        _storage(plan),
    ]
    effects.sort(key=lambda effect: -abs(effect.elasticity) if math.isfinite(effect.elasticity) else math.inf)
    return Sensitivity(plan.step_time_s, tuple(effects))


def _unit(value: float | None, unit: str) -> str:
    return f"{value:,.4g} {unit}" if value else ""


def _tflops(plan: Plan) -> str:
    return _unit(plan.question.machine.chip.tflops.bf16, "TFLOP/s in bf16")


def _unknown(resource: str, note: str) -> Effect:
    return Effect(resource, "", None, None, math.nan, math.nan, note)


def _effect(
    plan: Plan,
    q: Question,
    plain: Table | None,
    resource: str,
    value: str,
    changed: Changed,
    factors: tuple[float, float],
) -> Effect:
    asked = [replace(q, machine=changed(q.machine, factor)) for factor in factors]
    fewer, more = (
        _change(plan, search(one, plan.precision, plain), factor) for one, factor in zip(asked, factors, strict=True)
    )
    kept = [_kept_seconds(plan, one) for one in asked]
    return Effect(
        resource,
        value,
        fewer,
        more,
        _elasticity((fewer.step_time_s, more.step_time_s), factors, plan.step_time_s),
        _elasticity((kept[0], kept[1]), factors, plan.step_time_s),
    )


def _elasticity(seconds: tuple[float, float], factors: tuple[float, float], now: float) -> float:
    """The slope in logarithms; of one side where nothing fits on the other."""
    points = [(factor, time) for factor, time in zip(factors, seconds, strict=True) if math.isfinite(time)]
    if len(points) == 1:
        points.append((1.0, now))
    if not points:
        return math.nan
    (first, before), (second, after) = points[:2]
    return math.log(after / before) / math.log(second / first)


def _change(plan: Plan, found: Found, factor: float) -> Change:
    if not found.num_fitting:
        return Change(factor, math.inf, None, True)
    chosen = found.layout(0), found.micro_batch(0), found.recompute(0)
    moved = chosen != (plan.layout, plan.micro_batch, plan.recompute)
    return Change(factor, float(found.seconds[0]), chosen[0], moved)


def _kept_seconds(plan: Plan, q: Question) -> float:
    """The step time of the plan's own layout, whether or not it fits."""
    row = {name: column[:1] for name, column in plan.found.table.items()}
    engine = q.engine_for(plan.layout.shard > 1)
    prices = price(q.spec, q.machine, points_of(q, row), q.run(plan.precision, engine), engine)
    return float(prices.seconds[0])


def _storage(plan: Plan) -> Effect:
    """Hourly checkpoints, written while training waits, in a time that is not part of the step's own."""
    now = checkpoints(plan)

    def change(factor: float) -> Change:
        share = checkpoints(plan, storage_factor=factor).share
        return Change(factor, plan.step_time_s * (1 + share) / (1 + now.share), plan.layout, moved=False)

    elasticity = -now.share / (1 + now.share)
    stated = "assumed, hardware.storage.write_gb_s=... states it" if now.assumed else "stated"
    note = f"{stated}; hourly checkpoints of {now.gib:,.4g} GiB, while training waits"
    value = f"{now.write_gb_s:,.4g} GB/s"
    return Effect("storage", value, change(1 - STEP), change(1 + STEP), elasticity, elasticity, note)
