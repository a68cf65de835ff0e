"""The public rehearsal: one step of a real model under a layout, as one of its processes, beside what the plan says."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from zoo.dryrun.compose import compose
from zoo.dryrun.ledger import KINDS, Ledger, Travel
from zoo.dryrun.recompute import POSSIBLE, recomputed
from zoo.dryrun.stage import in_flight, layers_of, sends
from zoo.dryrun.step import Job, measure
from zoo.dryrun.windows import chosen, stand_ins
from zoo.plan.estimate import Estimate, estimate
from zoo.plan.flops import FlopCount, count_flops
from zoo.plan.layout import Layout
from zoo.plan.plan import Plan, plan
from zoo.plan.price import CONTEXT_GIB
from zoo.plan.question import Question, ask
from zoo.spec.base import ConfigError
from zoo.spec.hardware import HardwareSpec
from zoo.spec.model import ModelSpec
from zoo.spec.train import AdamWSpec

GIB = 2.0**30
PRECISIONS = ("bf16", "fp32")
SMALL = ("int64", "int32", "float64")
"""Dtypes of counts and of losses, which the planner leaves out."""


@dataclass(frozen=True)
class Collective:
    """All collectives of a step that are alike."""

    op: str
    axis: str
    """Of the mesh; `_experts`: of the experts' own."""
    size: int
    """Processes of the group."""
    dtype: str
    calls: int
    sent: int
    """Bytes that the process sends, in rings."""


@dataclass(frozen=True)
class DryRun:
    """What a step takes of one device."""

    planned: Estimate
    """The same by the planner's formulas."""
    stage: int
    """Of the pipeline, whose first process is rehearsed."""
    memory_gib: Mapping[str, float]
    """By kind at the peak; they sum to `peak_gib`."""
    peak_at: str
    """The part of the step in which the peak is."""
    phase_gib: Mapping[str, float]
    """The peaks of the parts of a step."""
    flops: Mapping[str, int]
    """Of matrix products: `forward`, `backward`, and `again` for what is computed twice. Attention counts all pairs."""
    planned_flops: float
    """The planner's count of forward and backward, all pairs too."""
    collectives: tuple[Collective, ...]
    num_layers: int
    """Of the stage."""
    layers_run: int
    """Of these, so many were run; each stands for those like it."""
    fused: bool
    seconds: float
    """That the rehearsal took."""

    @property
    def peak_gib(self) -> float:
        """Of tensors."""
        return sum(self.memory_gib.values())

    @property
    def total_gib(self) -> float:
        """With what drivers and communicators take by the planner's assumption."""
        return self.peak_gib + CONTEXT_GIB

    @property
    def fits(self) -> bool:
        """Whether the chip has the memory, as far as that is known."""
        limit = self.planned.memory_limit_gib
        return limit is None or self.total_gib <= limit

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes sent by the planner's kinds; `other`: what it does not count."""
        found: dict[str, int] = {}
        for row in self.collectives:
            kind = kind_of(row, self.planned.layout)
            found[kind] = found.get(kind, 0) + row.sent
        return found

    def to_dict(self) -> dict[str, Any]:
        """For programs: bytes, GiB, FLOPs."""
        planned = self.planned
        return {
            "model": planned.model,
            "hardware": planned.hardware,
            "num_devices": planned.num_devices,
            "layout": asdict(planned.layout),
            "seq_len": planned.seq_len,
            "global_batch": planned.global_batch,
            "micro_batch": planned.micro_batch,
            "precision": planned.precision,
            "recompute": planned.recompute,
            "fused": self.fused,
            "stage": self.stage,
            "num_layers": self.num_layers,
            "layers_run": self.layers_run,
            "seconds": self.seconds,
            "memory_gib": dict(self.memory_gib),
            "peak_gib": self.peak_gib,
            "total_gib": self.total_gib,
            "memory_limit_gib": planned.memory_limit_gib,
            "fits": self.fits,
            "peak_at": self.peak_at,
            "phase_gib": dict(self.phase_gib),
            "flops": dict(self.flops),
            "traffic": self.traffic,
            "collectives": [asdict(row) for row in self.collectives],
            "planned": {
                "engine": planned.engine,
                "memory_gib": dict(planned.memory_gib),
                "total_gib": planned.total_memory_gib,
                "flops": self.planned_flops,
                "traffic": dict(planned.traffic),
            },
        }


def kind_of(row: Collective, layout: Layout) -> str:
    """What the planner counts a collective as."""
    if row.dtype in SMALL or row.axis == "all":
        return "other"
    axis = row.axis.removesuffix("_experts")
    if axis == "shard":
        return "shard" if layout.shard > 1 else "dp"
    return "dp" if axis == "replicate" else axis


def dry_run(
    model: str | ModelSpec,
    hardware: str | HardwareSpec,
    *overrides: str,
    layout: Layout | None = None,
    fused: bool | None = None,
    skew: float = 1.0,
    stage: int | None = None,
    **options: Any,
) -> DryRun:
    """Run one training step of the real model, really spread, as one process of many, on tensors without values.

    Args:
        model, hardware, overrides: As `zoo.plan` takes them.
        layout: Absent: the planner's.
        fused: Count memory as fusing kernels use it, as engines on GPUs do; False: as torch runs the blocks one
            operation after the other. Absent: as on the kind of machine.
        skew: Rows that the experts of this process get, over the mean of all processes.
        stage: Of a pipeline; absent: the first or the last, whichever needs more memory.
        options: Further settings of a plan: seq_len, global_batch, micro_batch, recompute, tp, ...

    Raises:
        ConfigError: something is unknown, does not fit together, or cannot be rehearsed.
    """
    start = time.perf_counter()
    _check(options, skew)
    question, planned = _planned(model, hardware, overrides, layout, options)
    layout = planned.layout
    if stage is not None and not 0 <= stage < layout.pp:
        raise ConfigError(f"stage: found {stage}; must be one of the {layout.pp} stages (layout.pp), from 0")
    job = Job(
        spec=_trained(question, planned),
        layout=layout,
        seq_len=planned.seq_len,
        micro_batch=planned.micro_batch,
        num_micro_batches=planned.global_batch // (planned.micro_batch * layout.dp),
        recompute=planned.recompute,
        compute=planned.precision,
        fused=question.machine.chip.device != "cpu" if fused is None else fused,
        optimizer=AdamWSpec(lr=1e-3),
        skew=skew,
    )
    stages = sorted({0, layout.pp - 1}) if stage is None else [stage]
    rehearsed = [_rehearse(replace(job, stage=number)) for number in stages]
    found, layers, run, number = max(rehearsed, key=lambda made: made[0].peak)
    flops = _dense_flops(job.spec, planned.seq_len).training
    return DryRun(
        planned=planned,
        stage=number,
        memory_gib={kind: found.at_peak[kind] / GIB for kind in KINDS},
        peak_at=found.where,
        phase_gib={phase: nbytes / GIB for phase, nbytes in found.phase_peaks.items()},
        flops=dict(found.flops),
        planned_flops=flops * planned.seq_len * planned.global_batch / planned.num_devices,
        collectives=_collectives(found),
        num_layers=layers,
        layers_run=run,
        fused=job.fused,
        seconds=time.perf_counter() - start,
    )


def _rehearse(job: Job) -> tuple[Ledger, int, int, int]:
    """A step of one stage; its layers, how many of them were run, and its number."""
    layout, micro_batches = job.layout, job.num_micro_batches
    kinds = [job.spec.layer_kinds[layer] for layer in layers_of(job.spec.num_layers, layout, job.stage)]
    kept = chosen(kinds)
    measured = measure(job, [kinds[index] for index in kept])
    made = compose(measured, stand_ins(kinds, kept), micro_batches, in_flight(layout, job.stage, micro_batches))
    if layout.pp > 1:
        dtype = "bfloat16" if job.compute == "bf16" else "float32"
        numbers = job.micro_batch * job.seq_len // (layout.tp * layout.cp) * job.spec.d_model
        key, calls = Travel("send", "pp", layout.pp, dtype), sends(layout, job.stage) * micro_batches
        made.calls[key] += calls
        made.sent[key] += calls * numbers * (2 if job.compute == "bf16" else 4)
    return made, len(kinds), len(kept), job.stage


def _trained(question: Question, planned: Estimate) -> ModelSpec:
    """The model with the blocks of multi-token prediction if they are trained along."""
    spec, engine = question.spec, question.engine_for(planned.layout.shard > 1)
    wanted = question.run(planned.precision, engine).mtp
    if spec.mtp is None or spec.mtp.enabled == wanted:
        return spec
    return spec.replace(mtp=spec.mtp.replace(enabled=wanted))


def _dense_flops(spec: ModelSpec, seq_len: int) -> FlopCount:
    return count_flops(spec, seq_len, skip_masked=False)


def _collectives(found: Ledger) -> tuple[Collective, ...]:
    def order(key: Travel) -> int:
        return -found.sent[key]

    return tuple(Collective(*key, found.calls[key], found.sent[key]) for key in sorted(found.sent, key=order))


def _check(options: Mapping[str, Any], skew: float) -> None:
    precision, optimizer = options.get("precision"), options.get("optimizer")
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"precision: found {precision!r}; a rehearsal computes in {' or '.join(PRECISIONS)}")
    if optimizer not in (None, "adamw"):
        raise ConfigError(f"optimizer: found {optimizer!r}; a rehearsal updates with adamw")
    if not skew > 0:
        raise ConfigError(f"skew: found {skew}; must be above 0; 1 is the mean of all processes")
    if (recompute := options.get("recompute")) is not None:
        recomputed(recompute)


def _planned(
    model: str | ModelSpec,
    hardware: str | HardwareSpec,
    overrides: Sequence[str],
    layout: Layout | None,
    options: Mapping[str, Any],
) -> tuple[Question, Estimate]:
    """The question, and the estimate of the layout that is rehearsed."""
    if layout is None:
        found = _searched(model, hardware, overrides, options)
        return found.question, found.best
    degrees = {name: value for name, value in asdict(layout).items() if name != "shard"}
    asked = dict(options)
    micro_batch = asked.pop("micro_batch", None) or 1
    recompute = asked.pop("recompute", None)
    question = ask(model, hardware, overrides, fixed={**degrees, "micro_batch": micro_batch}, **asked)
    settings = {**question.estimate_options(), "micro_batch": micro_batch, "precision": question.precisions[0]}
    for tried in (recompute,) if recompute else POSSIBLE:
        priced = estimate(question.spec, question.machine, layout=layout, recompute=tried, **settings)
        if priced.fits:
            break
    return question, priced


def _searched(
    model: str | ModelSpec, hardware: str | HardwareSpec, overrides: Sequence[str], options: Mapping[str, Any]
) -> Plan:
    """The planner's choice among what can be rehearsed."""
    found = plan(model, hardware, *overrides, **options)
    if "recompute" in options or found.recompute in POSSIBLE:
        return found
    tried: list[Plan] = []
    for recompute in POSSIBLE:
        try:
            tried.append(plan(model, hardware, *overrides, **{**options, "recompute": recompute}))
        except ConfigError:  # nothing fits
            continue
    return min(tried, key=lambda other: other.step_time_s) if tried else found
