"""Time and memory of many layouts of one model on one machine at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.plan.engine import LOCAL, Engine, Facts, facts_of, reach_of
from zoo.plan.here import priced_here
from zoo.plan.kernels import beyond
from zoo.plan.layout import OFFLOADED, Array, Mask, Points
from zoo.plan.legal import mixtures
from zoo.plan.memory import ON_HOST, STATE_BYTES, Storage, memory_of, offloaded_bytes, total
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
KEPT_BY_ENGINE: dict[str, dict[str, Any]] = {
    # Logits in bf16 with a log-softmax and a gradient alike (MaskedCrossEntropy, fp32_upcast: false, in the
    # examples/benchmark/configs of NVIDIA-NeMo/Automodel).
    "fsdp": {"logit": 6.0, "keeps_gathered": True, "whole_ends": True},
    # A fused cross-entropy that writes its gradient over the logits (loss_fn: fused_crossentropy of llm-foundry).
    "fsdp@2023": {"logit": 4.0},
    # Logits in bf16 and in fp32, log-softmax and gradient in fp32 (cross_entropy of pytorch/torchtitan); the peaks that
    # its benchmarks of December 2024 state agree.
    "fsdp@2024": {"logit": 14.0},
    # Logits in bf16 that their gradient overwrites, and the gradient that comes back (Transformer Engine's loss, in
    # the recipes of NVIDIA-NeMo/Megatron-Bridge).
    **{f"megatron@{epoch}": {"logit": 4.0} for epoch in ("25.09", "25.11", "26.02", "26.04", "26.06")},
    # XLA gathers a layer's weights when it needs them and fuses the softmax.
    "maxtext": {"logit": 4.0, "gathered": 1.0},
}
"""What engines keep apart from `Storage`'s defaults, which are Megatron-Core's; of a release where it has its own."""
HOST_GB_S = 32.0
"""Between a device and its host where that is not known: PCIe 4.0 x16."""
HOST_UPDATE_GB_S = 40.0
"""Of the host's memory, for each device, while it updates states: half of what two sockets with eight channels of
DDR5-4800 have for each of eight devices (assumed)."""
HOST_UPDATE_BYTES = 28.0
"""Read and written by a host for each parameter that it updates: gradient, master weight and two moments."""
BEHIND = ("experts", "matmuls", "mixing", "memory")
"""Parts of a step that moving activations to the host and back hides behind."""


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
    step = step_of(work, points, facts, engine.constants, engine.habits(run.graphs))
    storage = storage_of(engine, run, facts)
    host_s = (hardware.chip.host.gb_s or HOST_GB_S) * 1e9
    if np.any(points.again(OFFLOADED)):
        sent = 2 * offloaded_bytes(spec, uses_of(spec, run.mtp), points, storage) / host_s
        beside = sum((step.parts[name] for name in BEHIND), np.zeros(1)) / work.micro_batches
        step.parts["offload"] = beyond(sent, beside) * work.micro_batches
    if storage.states_on_host:
        moved = (engine.gradient + storage.weight) / host_s + HOST_UPDATE_BYTES / (HOST_UPDATE_GB_S * 1e9)
        step.parts["optimizer"] = moved * work.shard_weights
    seconds = step.total
    memory = memory_of(spec, points, storage, mtp=run.mtp)
    memory["workspace"] = np.full(len(points), CONTEXT_GIB)
    gib, room = total(memory), hardware.chip.memory_gib or np.inf
    prices = Prices(work, facts, step, seconds, work.tokens / seconds, memory, gib, gib <= room)
    return priced_here(prices, spec, hardware, points, run) if engine.name == LOCAL else prices


def storage_of(engine: Engine, run: Run, facts: Facts) -> Storage:
    """What an engine keeps in which dtype."""
    usual, own = (KEPT_BY_ENGINE.get(name, {}) for name in (engine.name, f"{engine.name}@{engine.epoch}"))
    wasteful = not engine.meant and own.get("logit", 0.0) > usual.get("logit", math.inf)
    kept = {**usual, **({} if wasteful else own)}
    common: dict[str, Any] = {
        **kept,
        "moments": STATE_BYTES[run.optimizer],
        "states_on_host": run.optimizer in ON_HOST,
        "fused_attention": engine.fused_attention,
        "sequence_parallel": engine.sequence_parallel,
    }
    if facts.bits >= 32:
        return Storage(**{**common, "master": 0.0, "weight": 4.0, "activation": 4.0, "logit": 8.0})
    activation = 2.0 if facts.bits >= 16 else 1.5  # half of what is kept goes into narrow products
    return Storage(gradient=engine.gradient, activation=activation, **common)


def graphs_of(engine: Engine, spec: ModelSpec, hardware: HardwareSpec) -> int:
    """What an engine captures where nothing else is said.

    Whole iterations only where there is room for them, for mixtures of experts, which gain most, on attention alone.
    """
    attends = all("scores" in use.cost.mixing(2, True) for use in uses_of(spec, False) if use.is_mixer)
    roomy = (hardware.chip.memory_gib or 0.0) >= ROOMY_GIB
    whole = bool(mixtures(spec)) and attends and roomy
    return min(engine.graphs, 2 if whole else 1)
