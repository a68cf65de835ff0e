"""What a plan is asked for: a model, a machine, a batch, and what of the layout is fixed beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from zoo.plan.engine import LOCAL, Engine
from zoo.plan.estimate import run_of
from zoo.plan.here import chosen_engine, engine_for
from zoo.plan.here import with_measured as with_measured
from zoo.plan.layout import Layout, Points, recompute_parts
from zoo.plan.legal import check_given, mixtures
from zoo.plan.price import Run
from zoo.spec.base import ConfigError, decode
from zoo.spec.hardware import HardwareSpec
from zoo.spec.mla import MLASpec
from zoo.spec.mlp import MLPSpec
from zoo.spec.model import ModelSpec

SEQ_LEN = 4096
"""Tokens of a sequence where nobody says otherwise."""
TOKENS_AT_100M, GROWTH = 2.0**19, 1 / 3
"""Tokens of a step where nobody says otherwise: half a million for 100M parameters, as their cube root beyond. Half a
million for 125M and 3.2 million for 175B are the choice of arXiv:2005.14165, table 2.1."""
RESERVE = 0.04
"""Part of the memory that a plan leaves free: an allocator holds more than it hands out, 1.04 times as much in the
median of 43 runs on B200, 1.09 at most (SimuMax, b200_release_v1.2_summary.json)."""
CLEARLY_FASTER = 1.5
"""Ratio of measured peaks from which a machine without a stated precision computes in bf16."""
DEGREES = tuple(f.name for f in fields(Layout))


@dataclass(frozen=True)
class Question:
    """Everything that a search depends on."""

    spec: ModelSpec
    machine: HardwareSpec
    seq_len: int
    global_batch: int
    """Sequences of a step."""
    precisions: tuple[str, ...]
    """To choose from."""
    recomputes: tuple[str, ...]
    """To choose from."""
    fixed: Mapping[str, int] = field(default_factory=dict)
    """Degrees of the layout, and `micro_batch`, that are not searched."""
    engine: str | None = None
    optimizer: str = "adamw"
    mtp: bool | None = None
    routing: str = "balanced"
    graphs: str | None = None
    reserve: float = RESERVE
    """The part of a chip's memory that is left free."""
    chosen: tuple[str, ...] = ()
    """What was left open and filled in by rule: `seq_len`, `global_batch`, `precision`."""

    @property
    def room_gib(self) -> float:
        """Memory that a layout may take; endless where the chip's is not known."""
        return (self.machine.chip.memory_gib or math.inf) * (1.0 - self.reserve)

    def engine_for(self, sharded: bool) -> Engine:
        """The engine whose constants are used, by whether weights are fully sharded."""
        return chosen_engine(self.engine, self.machine, sharded)

    def run(self, precision: str, engine: Engine) -> Run:
        return run_of(self.spec, self.machine, engine, precision, self.optimizer, self.mtp, self.routing, self.graphs)

    def estimate_options(self) -> dict[str, Any]:
        """What an estimate of one of the layouts needs to be told beside the layout."""
        names = ("seq_len", "global_batch", "engine", "optimizer", "mtp", "routing", "graphs")
        return {name: getattr(self, name) for name in names}


def composed(model: str | ModelSpec, hardware: str | HardwareSpec, overrides: Sequence[str]) -> Any:
    """The descriptions of a model and a machine, and the name of the machine's precision.

    Raises:
        ConfigError: no such model or machine, or overrides that do not fit.
    """
    given = {"model": model, "hardware": hardware}
    for override in overrides:
        group = override.lstrip("+~").replace("/", ".").split(".")[0].split("=")[0]
        if not isinstance(given.get(group, ""), str):
            raise ConfigError(f"{override}: the {group} is given as a description; change it there (.replace)")
    named = {group: name for group, name in given.items() if isinstance(name, str)}
    if not named:
        return model, hardware, "auto"
    _check_names(given)
    from zoo.config import compose_groups
    from zoo.spec.composed import plain, take_model

    data = plain(compose_groups(named, overrides))
    spec, rest = take_model(data, None) if isinstance(model, str) else (model, data)
    machine = decode(HardwareSpec, rest["hardware"], "hardware") if isinstance(hardware, str) else hardware
    precision = rest["precision"]["compute"] if isinstance(hardware, str) else "auto"
    return spec, machine, precision


def _check_names(given: Mapping[str, Any]) -> None:
    from zoo.config import list_hardware, list_models
    from zoo.config_errors import unknown_option

    for group, known in (("model", list_models), ("hardware", list_hardware)):
        if isinstance(given[group], str) and given[group] not in known():
            raise ConfigError(unknown_option(group, given[group], known()))


def precision_of(machine: HardwareSpec, profile: str) -> str:
    """The precision of a machine's profile; where that is `auto`, bf16 if the machine is clearly faster in it."""
    peaks = machine.chip.tflops
    if profile != "auto":
        return profile
    return "bf16" if (peaks.bf16 or 0.0) >= CLEARLY_FASTER * (peaks.fp32 or 0.0) and peaks.bf16 else "fp32"


def tokens_of_step(spec: ModelSpec) -> float:
    """Tokens of a step for a model of this size (`TOKENS_AT_100M`)."""
    return float(TOKENS_AT_100M * (spec.params().total / 1e8) ** GROWTH)


def default_batch(spec: ModelSpec, num_devices: int, seq_len: int) -> int:
    """Sequences of a step: as many for every device, a power of two of them, about `tokens_of_step` in all."""
    each = tokens_of_step(spec) / seq_len / num_devices
    return int(num_devices * 2 ** max(0, round(math.log2(max(each, 1.0)))))


def default_seq_len(spec: ModelSpec) -> int:
    """SEQ_LEN, or the model's context or its learned positions where they are shorter."""
    bounds = [spec.card.context if spec.card else SEQ_LEN, spec.embedding.positions or SEQ_LEN]
    return min(SEQ_LEN, *bounds)


def recomputes_of(spec: ModelSpec) -> tuple[str, ...]:
    """What may be computed again that a model has, from nothing to all."""
    blocks = list(spec.slots.values())
    found = ["none", "selective:act"]
    if any(isinstance(block, MLASpec) for block in blocks):
        found += ["selective:mla_up_proj", "selective:mla_up_proj,act"]
    if any(isinstance(block, MLPSpec) for block in blocks):
        found.append("selective:mlp")
    if mixtures(spec):
        found.append("selective:moe")
    return (*found, "selective_op", "full")


def _recomputes(spec: ModelSpec, machine: HardwareSpec, engine: str | None) -> tuple[str, ...]:
    """What an engine can compute again: zoo's own layers, or nothing."""
    return ("none", "full") if (engine or engine_for(machine, False)) == LOCAL else recomputes_of(spec)


def ask(
    model: str | ModelSpec,
    hardware: str | HardwareSpec,
    overrides: Sequence[str] = (),
    *,
    seq_len: int | None = None,
    global_batch: int | None = None,
    precision: str | Sequence[str] | None = None,
    recompute: str | None = None,
    fixed: Mapping[str, int | None] | None = None,
    **options: Any,
) -> Question:
    """A question with everything that was left open filled in.

    Raises:
        ConfigError: something is unknown or impossible; one line for each mistake.
    """
    kept = {name: value for name, value in (fixed or {}).items() if value is not None}
    for name, value in {"seq_len": seq_len, "global_batch": global_batch, **kept}.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{name}: found {value!r}; must be a positive integer")
    spec, machine, profile = composed(model, hardware, overrides)
    machine = with_measured(machine)
    if recompute is not None:
        recompute_parts(recompute)
    length = seq_len or default_seq_len(spec)
    named = (precision,) if isinstance(precision, str) else tuple(precision or ())
    given = {"seq_len": seq_len, "global_batch": global_batch, "precision": precision}
    question = Question(
        spec=spec,
        machine=machine,
        seq_len=length,
        global_batch=global_batch or default_batch(spec, machine.num_devices, length),
        precisions=named or (precision_of(machine, profile),),
        recomputes=_recomputes(spec, machine, options.get("engine")) if recompute is None else (recompute,),
        fixed=kept,
        chosen=tuple(name for name, value in given.items() if value is None),
        **options,
    )
    check_question(question)
    return question


def check_question(question: Question) -> None:
    """Refuse what no layout can satisfy.

    Raises:
        ConfigError: fixed degrees that do not divide the devices or break a rule of layouts, or sequences that the
            model cannot read.
    """
    n = question.machine.num_devices
    product = 1
    for name in ("tp", "pp", "cp", "dp"):
        value = question.fixed.get(name, 1)
        product *= value
        if n % value:
            allowed = ", ".join(str(d) for d in divisors(n))
            raise ConfigError(f"{name}: found {value}; must divide the {n} devices (hardware.num_devices): {allowed}")
    if n % product:
        raise ConfigError(f"tp * pp * cp * dp: found {product}; must divide the {n} devices (hardware.num_devices)")
    fixed = dict(question.fixed)
    micro = fixed.pop("micro_batch", 1)
    batch = question.global_batch
    point = Points.of([Layout(**fixed)], seq_len=question.seq_len, global_batch=batch, micro_batch=micro)
    check_given(question.spec, point, {*question.fixed, "seq_len", "global_batch"})
    if not 0.0 <= question.reserve < 1.0:
        raise ConfigError(f"reserve: found {question.reserve}; must be a fraction of the memory, below 1")
    positions = question.spec.embedding.positions
    if positions and question.seq_len > positions:
        raise ConfigError(f"seq_len: found {question.seq_len}; the model has {positions} learned positions")


def divisors(number: int) -> list[int]:
    """All divisors, rising."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
