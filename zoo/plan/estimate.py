"""The public estimate: one layout of a model on a machine, priced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from zoo.plan.engine import LOCAL, Engine
from zoo.plan.error import Error, expected_error
from zoo.plan.flops import FlopCount, count_flops
from zoo.plan.here import chosen_engine, with_measured
from zoo.plan.layout import Layout, Points
from zoo.plan.legal import check
from zoo.plan.price import Prices, Run, graphs_of, price
from zoo.spec.base import ConfigError
from zoo.spec.hardware import HardwareSpec
from zoo.spec.model import ModelSpec


@dataclass(frozen=True)
class Estimate:
    """What a training step costs, and where it goes."""

    model: str
    hardware: str
    engine: str
    """With the release whose constants are used."""
    layout: Layout
    num_devices: int
    seq_len: int
    global_batch: int
    micro_batch: int
    precision: str
    recompute: str
    step_time_s: float
    tokens_per_s_per_device: float
    mfu: float
    """Model FLOP/s over the chip's dense peak in this precision; causal attention counts half, recomputing nothing."""
    flops: FlopCount
    """Of a token, forward; `flops.training` is what the mfu counts."""
    memory_gib: Mapping[str, float]
    """By component, on the fullest device."""
    memory_limit_gib: float | None
    """Of the chip."""
    fits: bool
    time_s: Mapping[str, float]
    """By part of a step; the sum is step_time_s. What runs beside other work counts only as far as it is not hidden."""
    traffic: Mapping[str, float] = field(default_factory=dict)
    """Bytes that a device sends in a step, by kind, hidden or not."""
    error: Error | None = None
    """Of the tokens per second, as cross-validation on published runs found it; None for zoo's own training here."""

    @property
    def tokens_per_s(self) -> float:
        """Of all devices."""
        return self.tokens_per_s_per_device * self.num_devices

    @property
    def total_memory_gib(self) -> float:
        return sum(self.memory_gib.values())


def estimate(
    model: str | ModelSpec,
    hardware: str | HardwareSpec,
    *overrides: str,
    layout: Layout | None = None,
    seq_len: int = 4096,
    global_batch: int | None = None,
    micro_batch: int = 1,
    precision: str = "bf16",
    recompute: str = "auto",
    engine: str | None = None,
    optimizer: str = "adamw",
    mtp: bool | None = None,
    routing: Literal["balanced", "learned"] = "balanced",
    graphs: Literal["none", "layers", "iteration"] | None = None,
    uneven_stages: bool = True,
) -> Estimate:
    """Estimate a training step: its time, its memory, and their parts.

    Args:
        model: A name (`zoo.list_models()`) or a description.
        hardware: A name (`zoo.list_hardware()`) or a description; the layout says how many devices there are.
        overrides: Changes, as on the command line: `"hardware.chip.memory_gib=288"`, `"model.moe.top_k=4"`.
        layout: Degrees of parallelism; absent: one device.
        seq_len: Tokens of a sequence.
        global_batch: Sequences of a step; absent: one micro-batch for each replica.
        micro_batch: Sequences that a replica works on at once.
        precision: Of matrix products: `fp32`, `bf16`, `fp8`, `mxfp8`, `nvfp4`, ... (`zoo.plan.engine.PRECISIONS`).
        recompute: `none`, `full`, `selective`, `selective:PART,PART` (`zoo.plan.layout`), or `auto`: none where that
            fits, else full.
        engine: Whose constants to use, `NAME` or `NAME@EPOCH` (`zoo.plan.engine.engine_names()`); absent: by the chip
            and by whether weights are fully sharded, at the newest release with published runs on the chip.
        optimizer: `adamw`, `muon`, `sgd` and others (`zoo.plan.memory.STATE_BYTES`).
        mtp: Train the described blocks of multi-token prediction; absent: as the description and the engine do.
        routing: `balanced`: every expert gets as many tokens; `learned`: the busiest device waits for none.
        graphs: What is captured instead of launched kernel by kernel; absent: as the engine does.
        uneven_stages: Pipeline stages may hold different numbers of layers.

    Raises:
        ConfigError: something is unknown or does not fit together; one line for each mistake.
    """
    spec, machine = described(model, hardware, overrides)
    machine = with_measured(machine)
    layout = layout or Layout()
    chosen = chosen_engine(engine, machine, layout.shard > 1)
    run = run_of(spec, machine, chosen, precision, optimizer, mtp, routing, graphs)
    _check_sizes({"seq_len": seq_len, "micro_batch": micro_batch, "global_batch": global_batch})
    batch = global_batch or micro_batch * layout.dp
    _check_devices(layout, overrides, machine)
    for tried in ("none", "full") if recompute == "auto" else (recompute,):
        points = Points.of([layout], seq_len=seq_len, global_batch=batch, micro_batch=micro_batch, recompute=tried)
        check(spec, points, uneven_stages)
        prices = price(spec, machine, points, run, chosen)
        if prices.fits[0]:
            break
    flops = count_flops(_with_mtp(spec, run.mtp), seq_len)
    return Estimate(
        model=spec.name,
        hardware=machine.name,
        engine=f"{chosen.name}@{chosen.epoch}",
        layout=layout,
        num_devices=layout.num_devices,
        seq_len=seq_len,
        global_batch=batch,
        micro_batch=micro_batch,
        precision=precision,
        recompute=tried,
        flops=flops,
        memory_limit_gib=machine.chip.memory_gib,
        traffic=_traffic(prices, points, chosen),
        error=None if chosen.name == LOCAL else expected_error(spec, machine.chip),
        **_figures(prices, flops),
    )


def _check_sizes(sizes: Mapping[str, int | None]) -> None:
    for name, value in sizes.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}: found {value!r}; must be a positive integer")


def _figures(prices: Prices, flops: FlopCount) -> dict[str, Any]:
    """The fields of an estimate that are read off the prices of its one layout."""
    rate = float(prices.tokens_per_s[0])
    return {
        "step_time_s": float(prices.seconds[0]),
        "tokens_per_s_per_device": rate,
        "mfu": flops.training * rate / float(prices.facts.peak),
        "memory_gib": {name: float(value[0]) for name, value in prices.memory_gib.items()},
        "fits": bool(prices.fits[0]),
        "time_s": {name: float(np.broadcast_to(value, (1,))[0]) for name, value in prices.step.parts.items()},
    }


def described(
    model: str | ModelSpec, hardware: str | HardwareSpec, overrides: Sequence[str] = ()
) -> tuple[ModelSpec, HardwareSpec]:
    """The descriptions of a model and of a machine, with overrides of either.

    Raises:
        ConfigError: no such model or machine, or overrides of what is given as a description, or of something else.
    """
    mine: dict[str, list[str]] = {"model": [], "hardware": []}
    for override in overrides:
        group = override.lstrip("+~").replace("/", ".").split(".")[0].split("=")[0]
        if group not in mine or "=" not in override:
            raise ConfigError(
                f"{override}: an estimate knows overrides of model and hardware: hardware.num_devices=256"
            )
        mine[group].append(override)
    for group, given in (("model", model), ("hardware", hardware)):
        if mine[group] and not isinstance(given, str):
            raise ConfigError(f"{mine[group][0]}: the {group} is given as a description; change it there (.replace)")
    from zoo.config import load

    spec = load(model, *mine["model"]) if isinstance(model, str) else model
    return spec, load_hardware(hardware, *mine["hardware"]) if isinstance(hardware, str) else hardware


def load_hardware(name: str, *overrides: str) -> HardwareSpec:
    """The description of a machine by name.

    Raises:
        ConfigError: no such machine, or overrides that do not fit it.
    """
    from zoo.config import compose, list_hardware
    from zoo.config_errors import unknown_option
    from zoo.spec.base import decode
    from zoo.spec.composed import plain

    if name not in list_hardware():
        raise ConfigError(unknown_option("hardware", name, list_hardware()))
    return decode(HardwareSpec, plain(compose([f"hardware={name}", *overrides]))["hardware"], "hardware")


def run_of(
    spec: ModelSpec,
    machine: HardwareSpec,
    engine: Engine,
    precision: str,
    optimizer: str = "adamw",
    mtp: bool | None = None,
    routing: str = "balanced",
    graphs: str | None = None,
) -> Run:
    """A run with what is left open filled in.

    Raises:
        ConfigError: a value is not allowed.
    """
    levels = {"none": 0, "layers": 1, "iteration": 2}
    for name, value, allowed in (("routing", routing, ("balanced", "learned")), ("graphs", graphs, (None, *levels))):
        if value not in allowed:
            raise ConfigError(f"{name}: found {value!r}; allowed: {', '.join(str(item) for item in allowed if item)}")
    if mtp and spec.mtp is None:
        raise ConfigError(f"mtp: found True; {spec.name} describes no multi-token prediction")
    if mtp is None:
        mtp = spec.mtp is not None and (spec.mtp.enabled or engine.trains_mtp)
    level = levels[graphs] if graphs is not None else graphs_of(engine, spec, machine)
    return Run(precision, optimizer, mtp, routing == "balanced", level)


def _check_devices(layout: Layout, overrides: Sequence[str], machine: HardwareSpec) -> None:
    named = any(override.lstrip("+").startswith("hardware.num_devices=") for override in overrides)
    if named and machine.num_devices != layout.num_devices:
        raise ConfigError(
            f"layout: tp * cp * pp * dp is {layout.num_devices}, hardware.num_devices {machine.num_devices}; "
            "they must be equal"
        )


def _with_mtp(spec: ModelSpec, mtp: bool) -> ModelSpec:
    if spec.mtp is None or spec.mtp.enabled == mtp:
        return spec
    return spec.replace(mtp=spec.mtp.replace(enabled=mtp))


def _traffic(prices: Prices, points: Points, engine: Engine) -> dict[str, float]:
    """Bytes of a step by kind: what forward and backward passes of all micro-batches and the update send."""
    t, again = prices.work.traffic, points.again("full")
    times, experts = points.num_micro_batches, 2 + np.maximum(again, points.again("moe"))
    # torch keeps what blocks have gathered, and adds up gradients of whole weights in every micro-batch; Megatron-Core
    # gathers a second time, for the gradients of weights (arXiv:2205.05198, section 4.2.2).
    by_torch = engine.name == "fsdp"
    tp = 2 * t.tp * ((2.0 if by_torch else 2.5) + again) + 4 * t.tp_ends + 2 * t.tp_whole * by_torch
    shared = (
        points.shard > 1
    )  # then gradients of shares are summed over the replicas, in the dtype they are scattered in
    found = {
        "tp": tp * times,
        "ep": 2 * t.ep * experts * times,
        "etp": 2 * t.etp * experts * times,
        "cp": 2 * t.cp * (3 + again) * times,
        "pp": 4 * t.pp * times,
        "shard": 6 * t.shard * times,
        "dp": np.where(shared, 4.0, engine.grad_bytes + 2) * (t.dp + t.dp_experts),
    }
    return {name: float(value[0]) for name, value in found.items()}
