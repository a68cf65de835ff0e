"""zoo's own training on the processor at hand, as an engine of the planner: its time and memory in place of modelled
ones."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.plan.engine import LOCAL, Engine, default_engine, engine_of
from zoo.plan.layout import Points
from zoo.plan.local import step_seconds
from zoo.plan.own_memory import peak_memory
from zoo.plan.step import Step
from zoo.spec.base import ConfigError
from zoo.spec.hardware import ChipSpec, HardwareSpec, PeakSpec
from zoo.spec.model import ModelSpec
from zoo.spec.train import AdamWSpec, MuonSpec, OptimizerSpec

if TYPE_CHECKING:
    from zoo.plan.price import Prices, Run

_PARTS = {"products": "matmuls", "attention": "mixing", "elementwise": "memory"}
"""What the planner calls the parts of a step."""


def engine_for(machine: HardwareSpec, sharded: bool) -> str:
    """The engine that is meant on a machine when none is named, by whether weights are fully sharded."""
    here = machine.detect and machine.chip.device == "cpu" and machine.num_devices == 1
    return LOCAL if here and speed_here().rates is not None else default_engine(machine.chip, sharded)


def chosen_engine(named: str | None, machine: HardwareSpec, sharded: bool) -> Engine:
    """The engine of that name, or without one that of the machine."""
    return engine_of(named) if named else replace(engine_of(engine_for(machine, sharded)), meant=False)


def with_measured(machine: HardwareSpec) -> HardwareSpec:
    """The machine; one that is to be detected with what this machine says of itself and what was measured on it."""
    if not machine.detect or (machine.chip.tflops.bf16 and machine.chip.memory_gb_s):
        return machine
    here = importlib.import_module("zoo.hardware")  # a floor above: it asks the machine, through torch
    local: HardwareSpec = here.local_hardware(machine)
    chip = local.chip
    if chip.tflops.fp32 and chip.memory_gb_s:
        return local
    speed = here.measure(chip)
    known = {name: value for name, value in chip.tflops.to_dict().items() if value is not None}
    peaks = PeakSpec(**{**speed.tflops, **known})
    return local.replace(chip=chip.replace(tflops=peaks, memory_gb_s=chip.memory_gb_s or speed.memory_gb_s))


def priced_here(prices: Prices, spec: ModelSpec, machine: HardwareSpec, points: Points, run: Run) -> Prices:
    """`prices` with what zoo's own training takes, wherever it does what a point says and fits.

    zoo recomputes whole layers or nothing. Facts of the chip that differ from the measured ones scale what depends on
    them: matrix products the peak, everything elementwise the bandwidth of memory.
    """
    optimizer = _optimizer(run.optimizer)
    speed, room = speed_here(), machine.chip.memory_gib or np.inf
    peak = getattr(machine.chip.tflops, run.precision, None) or machine.chip.tflops.fp32 or speed.tflops["fp32"]
    products = speed.tflops["fp32"] / peak
    bytes_slower = speed.memory_gb_s / (machine.chip.memory_gb_s or speed.memory_gb_s)
    trace = importlib.import_module("zoo.train.prediction")  # a floor above: it asks torch what a step does
    full = np.broadcast_to(points.again("full"), (len(points),))
    others = [np.broadcast_to(points.again(part), full.shape) for part in points.recompute if part != "full"]
    possible = np.sum(others, axis=0) == 0 if others else np.ones(len(points), dtype=bool)
    parts: dict[str, Any] = {name: np.zeros(len(points)) for name in (*prices.step.parts, *_PARTS.values(), "bubble")}
    memory: dict[str, Any] = {}
    for row in range(len(points)):
        size, seq_len, batch = (int(getattr(points, name)[row]) for name in ("micro_batch", "seq_len", "global_batch"))
        number, again = max(1, batch // size), bool(full[row])
        held = peak_memory(
            spec,
            batch_size=size,
            seq_len=seq_len,
            recompute="layer" if again else "none",
            optimizer=optimizer,
            compute="bf16" if run.precision == "bf16" else "fp32",
            grad_accumulation=number,
        )
        for name, value in held.parts.items():
            memory.setdefault(name, np.zeros(len(points)))[row] = value
        if held.total > room or not possible[row]:
            for name, column in prices.step.parts.items():
                parts[name][row] = np.broadcast_to(column, (len(points),))[row]
            continue
        ops = trace.known_step_ops(spec, size, seq_len, optimizer, "auto")
        for name, value in step_seconds(ops, speed.rates, number, again=again, products=products).items():
            parts[_PARTS.get(name, name)][row] = value * (bytes_slower if name == "elementwise" else 1.0)
    step = Step(parts)
    total = np.asarray(sum(memory.values(), np.zeros(len(points))))
    return replace(
        prices,
        step=step,
        seconds=step.total,
        tokens_per_s=prices.work.tokens / step.total,
        memory_gib=memory,
        total_gib=np.where(possible, total, np.inf),
        fits=possible & (total <= room),
    )


def _optimizer(name: str) -> OptimizerSpec:
    adamw = AdamWSpec(lr=1e-3)
    known = {"adamw": adamw, "muon": MuonSpec(lr=1e-3, adamw=adamw)}
    if name not in known:
        raise ConfigError(f"optimizer: found {name!r}; the engine {LOCAL} trains with {' or '.join(known)}")
    return known[name]


def speed_here() -> Any:
    """What was measured on this processor, overrides of its facts aside."""
    here = importlib.import_module("zoo.hardware")
    plain = HardwareSpec(name="cpu", detect=True, chip=ChipSpec(name="CPU", device="cpu"))
    return here.measure(here.local_hardware(plain).chip)
