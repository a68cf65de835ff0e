"""Published layouts are legal and fit, and the plan's own first choice is not slower than any of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.harness import Row
from benchmarks.planner_rows import Run, machine, model_of, runs
from zoo.plan.estimate import Estimate, estimate
from zoo.plan.plan import plan
from zoo.spec.base import ConfigError
from zoo.spec.hardware import HardwareSpec
from zoo.spec.model import ModelSpec

WITHIN = 1.05
CONTRADICTORY = {
    "T0261": "256 devices in 8 stages leave 32 for the experts of a layer, which the table divides among 64",
    "T0450": "12 pieces of a stage, of which there is one",
    "T0451": "12 pieces of a stage, of which there is one",
}
"""Runs whose sources state a layout that cannot be."""


@dataclass(frozen=True)
class Judged:
    """One published run, priced as anyone would price it: by default settings."""

    run: Run
    problem: str
    """Why it cannot be; empty: it is legal."""
    priced: Estimate | None


def stated() -> list[Run]:
    """Runs whose sources state a layout that can be; those of TPUs state none."""
    return [run for run in runs() if run.engine != "maxtext" and run.row_id not in CONTRADICTORY]


def assumed() -> list[Run]:
    """Runs on TPUs, by the habit of their recipes: all weights shared, layers computed again from inputs on the host
    (`remat_policy=custom decoder_layer_input=offload` in AI-Hypercomputer/tpu-recipes)."""
    found = [run for run in runs() if run.engine == "maxtext"]
    return [replace(run, recompute="full+offload") if run.recompute == "full" else run for run in found]


def series(run: Run) -> tuple[object, ...]:
    """What a plan is asked for."""
    facts = (run.model, run.hardware, run.domain, run.network_gbit_s, run.layout.num_devices, run.precision)
    return (*facts, run.seq_len, run.global_batch)


def described(run: Run) -> tuple[ModelSpec, HardwareSpec]:
    """The model and the machine of a run."""
    spec, hardware = model_of(run.model), machine(run.hardware)
    assert spec is not None
    domain, network = run.domain or hardware.domain_size, run.network_gbit_s or hardware.scale_out_gbit_s
    size = run.layout.num_devices
    return spec, hardware.replace(num_devices=size, domain_size=domain, scale_out_gbit_s=network, marks={})


def judged(run: Run) -> Judged:
    """The estimate of a published layout."""
    spec, hardware = described(run)
    settings = {"seq_len": run.seq_len, "global_batch": run.global_batch, "micro_batch": run.micro_batch}
    try:
        found = estimate(
            spec, hardware, layout=run.layout, precision=run.precision, recompute=run.recompute, **settings
        )
    except ConfigError as error:
        return Judged(run, str(error), None)
    return Judged(run, "", found)


def compared(found: list[Judged]) -> Iterator[tuple[Judged, float]]:
    """Each legal published layout with the step time of the plan's first choice over its own."""
    groups: dict[tuple[object, ...], list[Judged]] = defaultdict(list)
    for one in found:
        groups[series(one.run)].append(one)
    for members in groups.values():
        run = members[0].run
        spec, hardware = described(run)
        made = plan(spec, hardware, seq_len=run.seq_len, global_batch=run.global_batch, precision=run.precision)
        for one in members:
            if one.priced is not None:
                yield one, made.step_time_s / one.priced.step_time_s


def rows() -> list[Row]:
    found = [judged(run) for run in stated()]
    legal = [one.priced for one in found if one.priced is not None]
    fit = [priced for priced in legal if priced.fits]
    elsewhere = [judged(run).priced for run in assumed()]
    there = sum(bool(one and one.fits) for one in elsewhere)
    ratios = np.array([ratio for _, ratio in compared(found)])
    good = float(np.mean(ratios <= WITHIN))
    worst = float(np.max(ratios))
    return [
        _share("published layouts that are legal", len(legal), len(found)),
        _share("published layouts that fit", len(fit), len(found)),
        _share("runs on TPUs that fit", there, len(elsewhere), "layouts assumed, no bar"),
        Row(f"plans within 5% of a published layout ({len(ratios)})", f"{good:.1%}", "bar 100%", good),
        Row("slowest plan over a published layout, by the same estimate", f"{worst:.2f}", "bar 1.05", WITHIN / worst),
    ]


def _share(what: str, good: int, all_of: int, other: str = "bar: all") -> Row:
    return Row(what, f"{good} of {all_of}", other, good / all_of)
