"""All machines that zoo knows, read without composing them one by one."""

from __future__ import annotations

from functools import cache

from zoo.config import list_hardware
from zoo.config_reading import read
from zoo.spec.base import ConfigError, decode
from zoo.spec.hardware import HardwareSpec


@cache
def machines() -> tuple[HardwareSpec, ...]:
    """Every machine whose memory is known, the one with the least memory of a device first."""
    found = []
    for name in list_hardware():
        said = read("hardware", name, subgroups=("chip",))
        # What other groups bring, and interpolated sources, are not needed to know what a machine can hold.
        said = {key: value for key, value in said.items() if key not in ("sources", "marks")}
        try:
            machine = decode(HardwareSpec, said, f"hardware/{name}")
        except ConfigError:
            continue  # it leaves something open that only composing fills in
        if machine.chip.memory_gib and machine.chip.device != "cpu":
            found.append(machine)
    return tuple(sorted(found, key=lambda machine: (machine.chip.memory_gib or 0.0, machine.num_devices)))
