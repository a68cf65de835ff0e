"""What a training engine makes of a chip: named constants, fitted on published runs (benchmarks/fit_planner.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from zoo.plan.collectives import Links
from zoo.spec.base import ConfigError, near
from zoo.spec.hardware import ChipSpec, HardwareSpec


@dataclass(frozen=True)
class Constants:
    """How an engine runs. None of them belongs to a model or to a row; the units are in the text."""

    dense: Any = 0.92
    """Speed of plain matrix products in training over that of the same product measured alone."""
    dense_fp8: Any = 0.92
    """The same of fp8 products."""
    dense_fp4: Any = 0.92
    """The same of fp4 products."""
    grouped: Any = 0.80
    """Speed of the grouped products of experts over plain ones of their size."""
    grouped_narrow: Any = 0.90
    """A further factor on grouped products of 8 bits or less."""
    attention: Any = 0.90
    """Speed of attention in training over that measured alone."""
    recurrence: Any = 0.012
    """Speed of recurrences in chunks over the peak of the chip."""
    touches: Any = 1.5
    """How often a kept activation is read or written by what is no matrix product, in a forward pass."""
    touches_routed: Any = 1.5
    """The same of tokens on their way through experts."""
    casts: Any = 8.0
    """Bytes that are moved for each element that is cast to a narrow dtype."""
    casts_routed: Any = 12.0
    """The same of what goes into experts, and of gradients that come back."""
    launch_s: Any = 2e-5
    """Host time of a kernel; nothing is launched faster."""
    wake_s: Any = 2e-5
    """Until a host that waits for every kernel sees that it is done."""
    launch_partial: Any = 0.7
    """The part of it that is left when layers are captured in graphs."""
    launch_full: Any = 0.1
    """The part of it that is left when whole iterations are captured."""
    pace_full: Any = 1.1
    """A factor on the speeds of blocks with experts when whole iterations are captured: no gaps, no synchronization."""
    sustain: Any = 0.2
    """Exponent of a chip's power per peak FLOP/s, over that of an H100: clocks fall where power is short."""
    near: Any = 0.70
    """Bandwidth of collectives inside a domain over that of the link."""
    near_exchange: Any = 0.55
    """The same of all-to-alls that bring tokens to experts: 0.62 on an H100 and 0.4 to 0.5 on B200 and GB200 as
    measured (DeepEP, throughput_notes.md, section 3.4)."""
    far: Any = 0.75
    """Bandwidth of collectives between domains over that of the network."""
    start_s: Any = 1.2e-5
    """Until a collective in a group of one sends its first byte; longer by as much for each doubling."""
    tp_exposed: Any = 0.7
    """The part of tensor parallelism's traffic that nothing hides."""
    ep_exposed: Any = 0.8
    """The part of the traffic to experts and back that nothing hides."""
    ep_full: Any = 0.3
    """What is left of that when whole iterations are captured: then one micro-batch's exchanges run beside another's
    work."""
    cp_exposed: Any = 0.4
    """The part of context parallelism's traffic that nothing hides."""
    pp_exposed: Any = 0.5
    """The part of the traffic between stages that nothing hides."""
    dp_window: Any = 0.7
    """The part of a micro-batch's work that hides gathering weights and scattering gradients."""
    bubble: Any = 1.0
    """Waiting of pipeline stages over that of the schedule."""
    accumulate: Any = 8.0
    """Bytes that are moved for each weight when a micro-batch's gradients are added to those before."""
    micro_s: Any = 6e-3
    """Of a micro-batch on a piece of a stage beside its work: the schedule, waiting for neighbours."""
    step_s: Any = 0.05
    """Of a step, beside its micro-batches: the update's launches, synchronization, logging."""
    jitter: Any = 0.01
    """How much longer everything takes for each doubling of the number of domains."""
    pace: Any = 1.0
    """A factor on all speeds of a device."""
    pace_moe: Any = 1.0
    """A further factor on those of blocks with experts, and on the launches of their kernels."""


@dataclass(frozen=True)
class Habits:
    """What an engine does, whatever its speed, as numbers or as arrays [n]."""

    fused_attention: Any = True
    """False: attention writes its scores to memory."""
    sequence_parallel: Any = True
    """Devices of tensor parallelism share the residual stream (arXiv:2205.05198); False: each has all of it."""
    blocking: Any = False
    """The host waits for every kernel before it launches the next."""
    grad_bytes: Any = 4.0
    """Of a gradient on a link."""
    graphs: Any = 0
    """0: every kernel is launched by the host; 1: layers are captured; 2: whole iterations are."""


@dataclass(frozen=True)
class Engine:
    """An engine at one of its releases."""

    name: str
    epoch: str
    constants: Constants
    fused_attention: bool = True
    """This, `sequence_parallel`, `blocking` and `grad_bytes` as `Habits` has them."""
    sequence_parallel: bool = True
    blocking: bool = False
    grad_bytes: float = 4.0
    trains_mtp: bool = False
    """Described blocks of multi-token prediction are trained unless one says otherwise."""
    gradient: float = 4.0
    """Bytes of a gradient in memory."""
    graphs: int = 0
    """What it captures at most, as `Habits` has it."""
    meant: bool = True
    """Somebody named it. Else it stands for any engine of its kind, and what one release wastes is not counted."""

    def habits(self, graphs: int) -> Habits:
        """What it does in a run that captures `graphs`."""
        return Habits(self.fused_attention, self.sequence_parallel, self.blocking, self.grad_bytes, graphs)


@dataclass(frozen=True)
class Facts:
    """What a machine could do, as numbers or as arrays [n]; seconds, bytes and FLOP per second."""

    peak: Any
    """Of matrix products in the precision of the run."""
    wide: Any
    """Of matrix products in bf16, or in fp32 where the run is."""
    reach: Any
    """What large products come to of `peak`, measured alone."""
    reach_wide: Any
    reach_attention: Any
    bits: Any
    """Of a factor: 16, 8, 4."""
    byte_s: Any
    """Of memory."""
    power: Any
    """Watts per peak FLOP/s over those of an H100; 1 where they are not known."""
    domain: Any
    near_byte_s: Any
    far_byte_s: Any

    def links(self, constants: Constants) -> Links:
        return Links(self.domain, self.near_byte_s * constants.near, self.far_byte_s * constants.far, constants.start_s)

    def exchange_links(self, constants: Constants) -> Links:
        """The same as all-to-alls find them."""
        return replace(self.links(constants), near_byte_s=self.near_byte_s * constants.near_exchange)


H100_WATTS = 700 / 989
"""Per peak TFLOP/s in bf16."""

PRECISIONS = {
    "fp32": ("fp32", 32),
    "bf16": ("bf16", 16),
    "fp16": ("bf16", 16),
    "fp8": ("fp8", 8),
    "fp8_delayed": ("fp8", 8),
    "fp8_current_scaling": ("fp8", 8),
    "fp8_blockwise": ("fp8", 8),
    "mxfp8": ("fp8", 8),
    "int8": ("int8", 8),
    "nvfp4": ("fp4", 4),
}
"""Names of precisions: the peak that counts, and the bits of a factor."""


def facts_of(hardware: HardwareSpec, precision: str, reach: Mapping[str, float]) -> Facts:
    """The facts of a machine for a run.

    Args:
        reach: of its chip, as `reach_of` gives it.

    Raises:
        ConfigError: no such precision, or the chip lacks a number that the estimate needs.
    """
    if precision not in PRECISIONS:
        hint = near(precision, PRECISIONS) or f"allowed: {', '.join(PRECISIONS)}"
        raise ConfigError(f"precision: found {precision!r}; {hint}")
    dtype, bits = PRECISIONS[precision]
    chip = hardware.chip
    wide_name = "fp32" if dtype == "fp32" else "bf16"
    wide = _need(chip, f"tflops.{wide_name}", getattr(chip.tflops, wide_name) or chip.tflops.fp32)
    peak = _need(chip, f"tflops.{dtype}", getattr(chip.tflops, dtype) or (wide if dtype == "bf16" else None))
    byte_s = _need(chip, "memory_gb_s", chip.memory_gb_s) * 1e9
    link = (chip.scale_up.gb_s or chip.host.gb_s or 0.0) * 1e9 or byte_s
    network = (hardware.scale_out_gbit_s or 0.0) / 8 * 1e9 or link
    return Facts(
        peak * 1e12,
        wide * 1e12,
        reach.get(dtype, reach["bf16"]),
        reach["bf16"],
        reach["attention"],
        float(bits),
        byte_s,
        chip.power_w / (chip.tflops.bf16 * H100_WATTS) if chip.power_w and chip.tflops.bf16 else 1.0,
        float(hardware.domain_size),
        link,
        network,
    )


def _need(chip: ChipSpec, path: str, value: float | None) -> float:
    if value is None:
        raise ConfigError(
            f"hardware.chip.{path}: the estimate needs it, and it is not known for {chip.name}; "
            f"give it (hardware.chip.{path}=...) or choose another precision"
        )
    return value


@cache
def _data() -> dict[str, Any]:
    text = resources.files("zoo.plan").joinpath("engine.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def errors() -> dict[str, Any]:
    """What `benchmarks/fit_planner.py` found by cross-validation: the names of models and chips with runs in the fit,
    and by what was left out (`model`, `family`, `chip`) and sort of model the median and 90th percentile of errors."""
    found: dict[str, Any] = _data()["errors"]
    return found


def reach_of(chip: ChipSpec) -> dict[str, float]:
    """What large kernels reach of a chip's peaks, by dtype, and `attention`; the median of all chips if unmeasured."""
    table: dict[str, dict[str, float]] = _data()["reach"]
    return {**table["*"], **table.get(chip.name, {})}


def engine_names() -> list[str]:
    """`ENGINE` for the newest release of each, and `ENGINE@EPOCH` for every one that was fitted."""
    engines = _data()["engines"]
    return [*engines, *(f"{name}@{epoch}" for name, engine in engines.items() for epoch in engine["epochs"])]


def engine_of(name: str) -> Engine:
    """An engine by name, at its newest release unless `@EPOCH` says another.

    Raises:
        ConfigError: no such engine or release.
    """
    engines, (base, _, epoch) = _data()["engines"], name.partition("@")
    if name in (LOCAL, f"{LOCAL}@measured"):
        return Engine(LOCAL, "measured", Constants())
    if base not in engines or (epoch and epoch not in engines[base]["epochs"]):
        hint = near(name, engine_names()) or f"allowed: {', '.join(engine_names())}"
        raise ConfigError(f"engine: found {name!r}; {hint}")
    described = engines[base]
    epoch = epoch or list(described["epochs"])[-1]
    settings = {**described["settings"], **described["epochs"][epoch].get("settings", {})}
    values = {**_data()["shared"], **described["constants"], **described["epochs"][epoch]["constants"]}
    return Engine(base, epoch, Constants(**values), **settings)


LOCAL = "zoo"
"""zoo's own training on the processor at hand, priced by what was measured there (`zoo.plan.here`)."""


def default_engine(chip: ChipSpec, sharded: bool) -> str:
    """The engine that is meant when none is named: by the kind of device, and whether weights are fully sharded.

    At the newest release whose runs on this chip were published; at the newest of all if none were.
    """
    base = "maxtext" if chip.device == "xla" else "fsdp" if sharded else "megatron"
    epoch = _data()["engines"][base]["chips"].get(chip.name)
    return f"{base}@{epoch}" if epoch else base
