"""A rehearsed step of a 550B model on 256 and on 2,048 GPUs: its time, its memory, and how near the planner is."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

from benchmarks.harness import Row
from zoo.dryrun import DryRun, dry_run

MODEL, HARDWARE = "nemotron_3_ultra_550b_a55b", "gb300_nvl72"
PARTS = ("256", "2048")
"""Devices."""
SECONDS, GIB = 90.0, 4.0
PEAK, VOLUME = 0.05, 0.01
"""Bars of differences from the planner."""


def rows(part: str = "256") -> list[Row]:
    """One number of devices."""
    start, used = time.perf_counter(), _cpu_seconds()
    made = dry_run(MODEL, HARDWARE, f"hardware.num_devices={part}")
    return list(_rows(made, time.perf_counter() - start, _cpu_seconds() - used))


def _rows(made: DryRun, seconds: float, cpu_seconds: float) -> Iterator[Row]:
    planned, name = made.planned, f"{made.planned.num_devices:,} GPUs"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    note = f"{cpu_seconds:.0f} s of one core; {made.layers_run} of {made.num_layers} layers run"
    yield Row(f"a step of {MODEL} on {name}", f"{seconds:.0f} s", f"bar {SECONDS:.0f} s", SECONDS / seconds, note)
    yield Row(f"memory of that, {name}", f"{resident:.2f} GiB", f"bar {GIB:.0f} GiB", GIB / resident)
    sent, plan = sum(made.traffic.values()), sum(planned.traffic.values())
    for what, ours, theirs, bar, unit in (
        ("peak memory", made.total_gib, planned.total_memory_gib, PEAK, "GiB"),
        ("communication", sent / 2**30, plan / 2**30, VOLUME, "GiB"),
    ):
        off = abs(ours / theirs - 1)
        figures = f"{ours:.1f} {unit}", f"planner {theirs:.1f} {unit}, bar {bar:.0%}"
        yield Row(f"{what}, {name}", *figures, bar / max(off, 1e-4), f"{ours / theirs - 1:+.2%}")
    counted = made.flops["forward"] + made.flops["backward"]
    equal = 1.0 if counted == made.planned_flops else 0.0
    yield Row(f"FLOPs, {name}", f"{counted:,}", f"planner {made.planned_flops:,.0f}", equal, str(planned.layout))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
