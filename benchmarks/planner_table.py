"""All published runs as arrays: work, facts, and what was measured. No constants of an engine are in here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planner_rows import Run, machine, model_of
from zoo.plan.engine import Facts, Habits, facts_of
from zoo.plan.layout import Array, Points
from zoo.plan.traffic import Traffic
from zoo.plan.work import Work, work_of
from zoo.spec.hardware import HardwareSpec

CONF = Path(__file__).parents[1] / "conf" / "hardware"

REACH: dict[str, dict[str, float]] = {
    # Large kernels measured alone, over the peaks of conf/hardware/chip: throughput_notes.md, sections 3.1 and 3.2.
    "*": {"fp32": 0.80, "bf16": 0.77, "fp8": 0.72, "fp4": 0.42, "int8": 0.65, "attention": 0.72},
    "a100_sxm": {"bf16": 0.81, "attention": 0.69},
    "a100_sxm_40": {"bf16": 0.81, "attention": 0.69},
    "h100_sxm": {"bf16": 0.82, "fp8": 0.71, "attention": 0.74},
    "h100_sxm_96": {"bf16": 0.72, "fp8": 0.62, "attention": 0.65},
    "h800_sxm": {"bf16": 0.82, "fp8": 0.71, "attention": 0.74},
    "h200_sxm": {"bf16": 0.81, "fp8": 0.71, "attention": 0.72},
    "b200": {"bf16": 0.75, "fp8": 0.75, "fp4": 0.50, "attention": 0.72},
    "b300": {"bf16": 0.80, "fp8": 0.75, "fp4": 0.37, "attention": 0.87},
    "gb200": {"bf16": 0.73, "fp8": 0.72, "fp4": 0.50, "attention": 0.71},
    "gb300": {"bf16": 0.81, "fp8": 0.74, "fp4": 0.37, "attention": 0.82},
    "rtx_pro_6000": {"bf16": 0.90, "attention": 0.78},
    "l40s": {"bf16": 0.71, "attention": 0.59},
    "mi300x": {"bf16": 0.51, "fp8": 0.45, "attention": 0.40},
    "mi325x": {"bf16": 0.60, "fp8": 0.50, "attention": 0.45},
    "mi350x": {"bf16": 0.63, "fp8": 0.55, "attention": 0.50},
    "mi355x": {"bf16": 0.63, "fp8": 0.55, "attention": 0.50},
    "gaudi2": {"bf16": 0.97},
    "gaudi3": {"bf16": 0.74},
    "tpu_v5e": {"bf16": 0.85, "attention": 0.60},
    "tpu_v5p": {"bf16": 0.85, "attention": 0.60},
    "tpu_v6e": {"bf16": 0.85, "fp8": 0.80, "attention": 0.55},
    "tpu_v7": {"bf16": 0.80, "fp8": 0.75, "attention": 0.55},
}

LEAN = {"gradient": 2.0, "grad_bytes": 2.0}
"""Gradients are kept and sent in bf16 (grad_reduce_in_fp32=False in NeMo's bf16_mixed and its successors)."""

EARLY = {"fused_attention": False, "sequence_parallel": False, "blocking": True, "grad_bytes": 8.0}
"""Of engines older than arXiv:2205.14135 and arXiv:2205.05198 that wait for their kernels and all-reduce gradients in
fp32 (or as slowly: T1136 and T1137 have 24 replicas, T1165 to T1168 four sizes of a batch)."""

ENGINES: dict[str, dict[str, Any]] = {
    "megatron": {
        "settings": {"trains_mtp": True},
        "last": "26.06",
        "epochs": {
            **{epoch: {**EARLY, "gradient": 2.0} for epoch in ("deepspeed_0220", "deepspeed_0225")},
            "deepspeed": EARLY,
            **dict.fromkeys(("24.09", "25.04"), LEAN),
            **{epoch: {"graphs": 1, **LEAN} for epoch in ("dev", "25.09", "25.11", "26.02", "26.04")},
            "26.06": {"graphs": 2, **LEAN},
        },
    },
    "fsdp": {"settings": {}, "last": "automodel", "epochs": {"internevo": {"sequence_parallel": False}}},
    "maxtext": {"settings": {"grad_bytes": 2.0}, "last": "tpu", "epochs": {}},
}

RELEASES = {
    "megatron": ("2022", "24.09", "25.04", "25.09", "25.11", "26.02", "26.04", "26.06"),
    "fsdp": ("2023", "2024", "2025", "automodel"),
    "maxtext": ("gpu", "tpu"),
}
"""Epochs that followed each other, which others beside them did not."""


@dataclass(frozen=True)
class Table:
    """All runs as arrays [n]."""

    runs: list[Run]
    work: Work
    points: Points
    facts: Facts
    chips: np.ndarray
    tokens_per_s: np.ndarray
    habits: Habits
    weights: np.ndarray
    """Runs that resemble each other count less each."""
    series: np.ndarray
    """The number of the group of runs that differ in layout only."""


def chip_id(name: str) -> str:
    """The id of the chip of a profile."""
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    return text.split("chip:")[1].split()[0]


def chip_name(chip: str) -> str:
    """The name of a chip by the id of its file."""
    if chip == "*":
        return chip
    text = (CONF / "chip" / f"{chip}.yaml").read_text(encoding="utf-8")
    return next(line for line in text.splitlines() if line.startswith("name:")).split(":", 1)[1].strip(" '\"")


def table_of(found: list[Run]) -> Table:
    """Work and facts of all runs."""
    groups: dict[tuple[str, int, int], list[int]] = {}
    for index, run in enumerate(found):
        groups.setdefault((run.model, run.mtp, run.balanced), []).append(index)
    order = [index for indices in groups.values() for index in indices]
    works = []
    for (model, mtp, balanced), indices in groups.items():
        spec = model_of(model)
        assert spec is not None
        works.append(work_of(spec, points_of([found[i] for i in indices]), mtp=bool(mtp), balanced=bool(balanced)))
    ordered = [found[index] for index in order]
    machines = {name: machine(name) for name in {run.hardware for run in ordered}}
    chips = {name: chip_id(name) for name in machines}
    facts = [fact_row(machines[run.hardware], chips[run.hardware], run) for run in ordered]
    joined = Facts(**{f.name: np.array([getattr(fact, f.name) for fact in facts]) for f in fields(Facts)})
    alike = Counter((run.model, run.hardware, run.source) for run in ordered)
    return Table(
        ordered,
        concat(works),
        points_of(ordered),
        joined,
        np.array([chips[run.hardware] for run in ordered]),
        np.array([run.tokens_per_s for run in ordered]),
        habits_of(ordered),
        np.array([alike[run.model, run.hardware, run.source] ** -0.35 for run in ordered]),
        np.unique([str((*run.series, run.recompute, run.graphs)) for run in ordered], return_inverse=True)[1],
    )


def newest_on(table: Table) -> dict[str, dict[str, str]]:
    """By engine and name of a chip, the newest release with runs on it, where that is not the newest of all."""
    found: dict[str, dict[str, str]] = {}
    for engine, releases in RELEASES.items():
        seen = {(chip, run.epoch) for chip, run in zip(table.chips, table.runs, strict=True) if run.engine == engine}
        newest = {
            str(chip): release for release in releases for chip in sorted(set(table.chips)) if (chip, release) in seen
        }
        found[engine] = {chip_name(chip): release for chip, release in newest.items() if release != releases[-1]}
    return found


def setting(run: Run, name: str, usual: Any) -> Any:
    described = ENGINES[run.engine]
    return {**described["settings"], **described["epochs"].get(run.epoch, {})}.get(name, usual)


def habits_of(found: list[Run]) -> Habits:
    """What the engines of runs do. The baselines that arXiv:2205.05198 compares with recompute whole layers and do not
    share the residual stream."""
    columns: dict[str, Any] = {
        name: np.array([setting(run, name, getattr(Habits(), name)) for run in found])
        for name in ("fused_attention", "sequence_parallel", "blocking", "grad_bytes")
    }
    baseline = np.array([run.epoch == "2022" and run.recompute == "full" for run in found])
    columns["sequence_parallel"] &= ~baseline
    return Habits(graphs=np.array([run.graphs for run in found]), **columns)


def fact_row(hardware: HardwareSpec, chip: str, run: Run) -> Facts:
    reach = {**REACH["*"], **REACH.get(chip, {})}
    facts = facts_of(hardware, run.precision, reach)
    network = run.network_gbit_s / 8 * 1e9 or facts.far_byte_s
    return replace(facts, domain=float(run.domain or hardware.domain_size), far_byte_s=network)


def points_of(found: list[Run]) -> Points:
    return Points.of(
        [run.layout for run in found],
        seq_len=[run.seq_len for run in found],
        global_batch=[run.global_batch for run in found],
        micro_batch=[run.micro_batch for run in found],
        recompute=[run.recompute for run in found],
    )


def concat(works: Iterable[Work]) -> Work:
    """Work of several models as one: operations that a model does not have happen no times."""
    works = list(works)

    def join(arrays: list[Array]) -> Array:
        if arrays[0].ndim == 1:
            return np.concatenate(arrays)
        rows = max(len(array) for array in arrays)
        padded = [np.pad(array, ((0, rows - len(array)), (0, 0))) for array in arrays]
        return np.concatenate(padded, axis=1)

    def joined(parts: list[object]) -> dict[str, object]:
        values: dict[str, object] = {}
        for f in fields(parts[0]):  # type: ignore[arg-type]
            column = [getattr(part, f.name) for part in parts]
            values[f.name] = type(column[0])(**joined(column)) if isinstance(column[0], Traffic) else join(column)
        return values

    return Work(**joined(list(works)))  # type: ignore[arg-type]
