"""Checkpoints: how large they are, how long they take to write, and what of that training waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoo.plan.memory import STATE_BYTES
from zoo.plan.price import HOST_GB_S
from zoo.spec.hardware import HardwareSpec

if TYPE_CHECKING:
    from zoo.plan.plan import Plan

EVERY_S = 3600.0
"""Training seconds between two checkpoints where nobody says how many steps."""
NODE = 8
"""Devices that write through one file system client."""
NODE_GB_S, POD_GB_S, POD_NODES = 4.0, 20.0, 32
"""Writing where a machine does not state it: a node by itself, and all of a pod of as many nodes together. From the
column "better" of table 6 of NVIDIA's DGX SuperPOD reference architecture for DGX H100 (RA-11333-001 V11); its other
columns are 2 and 7 ("good"), 20 and 62 GB/s ("best")."""


@dataclass(frozen=True)
class Checkpoints:
    """What writing the weights and the optimizer's states now and then takes."""

    gib: float
    """Of one: weights in fp32 and the optimizer's moments."""
    write_gb_s: float
    assumed: bool
    """The machine does not state how fast its storage is; `write_gb_s` is what `NODE_GB_S` and its like make of it."""
    every: int
    """Steps between two."""
    waits: bool
    """Training waits until one is written; else only until it is copied to the hosts' memory, and written behind."""
    write_s: float
    wait_s: float
    """What training waits for each."""
    share: float
    """The time that all of them add, over that of training."""


def checkpoints(
    plan: Plan, *, every: int | None = None, background: bool = False, storage_factor: float = 1.0
) -> Checkpoints:
    """The checkpoints of a training run.

    Args:
        every: Steps between two; absent: as many as take an hour.
        background: Write while training goes on.
        storage_factor: How many times as fast the storage is.
    """
    machine, step_s = plan.question.machine, plan.step_time_s
    steps = every or max(1, round(EVERY_S / step_s))
    stated = machine.storage.write_gb_s
    speed = (stated or assumed_write_gb_s(machine)) * storage_factor
    size = plan.question.spec.params().total * (4.0 + STATE_BYTES[plan.question.optimizer])
    write_s, between_s = size / (speed * 1e9), steps * step_s
    copy_s = size / machine.num_devices / ((machine.chip.host.gb_s or HOST_GB_S) * 1e9)
    wait_s = copy_s + max(0.0, write_s - between_s) if background else write_s
    return Checkpoints(
        gib=size / 2**30,
        write_gb_s=speed,
        assumed=not stated,
        every=steps,
        waits=not background,
        write_s=write_s,
        wait_s=wait_s,
        share=wait_s / between_s,
    )


def assumed_write_gb_s(machine: HardwareSpec) -> float:
    """GB/s of all nodes together, where a machine does not state it."""
    nodes = max(1.0, machine.num_devices / NODE)
    return max(min(nodes * NODE_GB_S, POD_GB_S), nodes / POD_NODES * POD_GB_S)
