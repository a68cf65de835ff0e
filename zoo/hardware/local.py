"""What the operating system and the drivers say about this machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

from zoo.spec.base import ConfigError, decode
from zoo.spec.hardware import ChipSpec, HardwareSpec

_TRAINS_ON = ("cuda", "mps", "cpu")
"""Kinds of devices that zoo computes on, the preferred one first."""
_CGROUP_USED = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")
_CGROUP_MEMORY = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def local_hardware(spec: HardwareSpec) -> HardwareSpec:
    """`spec` with what it leaves open filled in from this machine: one device, of the kind that it names or the best.

    A chip that one of the profiles lists as reported by its driver gets the facts of that profile; what the
    configuration states stays as it is.

    Raises:
        ConfigError: this machine has no such device.
    """
    device = _device(spec)
    if not spec.detect:
        return spec.replace(chip=spec.chip.replace(device=device))
    found = _cpu() if device == "cpu" else _gpu(device)
    stated = {name: value for name, value in spec.chip.to_dict().items() if value != _UNSTATED[name]}
    chip = decode(ChipSpec, _merged(found, stated | {"name": found["name"], "device": device}), "hardware.chip")
    return spec.replace(chip=chip)


_UNSTATED = ChipSpec(name="").to_dict()


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below`, overridden key by key by what `above` states."""
    merged = dict(below)
    for name, value in above.items():
        if isinstance(value, dict):
            stated = {key: item for key, item in value.items() if item is not None}
            merged[name] = {**below.get(name, {}), **stated}
        else:
            merged[name] = value
    return merged


def _device(spec: HardwareSpec) -> str:
    """The kind of device to compute on."""
    available = _available()
    wanted = spec.chip.device
    if wanted is None:
        return next(device for device in _TRAINS_ON if device in available)
    if wanted not in available:
        raise ConfigError(
            f"hardware: found {spec.name!r} ({spec.chip.name}, torch device {wanted}); this machine has "
            f"{' and '.join(sorted(available))} alone as far as torch {_torch().__version__} can see; "
            "use hardware=auto"
        )
    return wanted


def _available() -> set[str]:
    torch = _torch()
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return {"cpu", *(name for name, there in present.items() if there)}


def _gpu(device: str) -> dict[str, Any]:
    """The facts of the first GPU, as data of a `ChipSpec`."""
    if device == "mps":
        return {"name": _cpu_name(), "memory_gib": _memory_gib()}
    properties = _torch().cuda.get_device_properties(0)
    known = chip_reported_as(properties.name)
    if known is not None:
        return known.to_dict()
    memory_gib = round(properties.total_memory / 2**30, 2)
    return {"name": properties.name, "memory_gib": memory_gib, "num_cores": properties.multi_processor_count}


def _cpu() -> dict[str, Any]:
    return {"name": _cpu_name(), "num_cores": num_cpus(), "memory_gib": _memory_gib()}


def chip_reported_as(name: str) -> ChipSpec | None:
    """The profile of the chip whose driver calls it `name`; None when no profile lists exactly that name.

    Names that merely look alike are other chips: a laptop's RTX 4090 is not the desktop's.
    """
    from omegaconf import OmegaConf

    for file in resources.files("zoo.conf").joinpath("hardware", "chip").iterdir():
        text = file.read_text(encoding="utf-8") if file.name.endswith(".yaml") else ""
        if name.lower() not in text.lower():
            continue
        data: Any = OmegaConf.to_container(OmegaConf.create(text))
        data.pop("defaults", None)
        if name.lower() in (reported.lower() for reported in data.get("reported_as", ())):
            return decode(ChipSpec, data, f"hardware/chip/{file.name}")
    return None


def num_cpus() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    """What the processor calls itself."""
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine() or "CPU"


def _memory_gib() -> float:
    """Memory of the machine, or what its container may use of it."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, _CGROUP_MEMORY):
        text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        limits += [int(text)] if text.isdigit() else []
    return round(min(limits) / 2**30, 2)


def available_gib(device: str) -> float | None:
    """Memory of a kind of device that is free for this process; None where nobody says.

    On a processor: what the system can hand out without swapping, and no more than the container has left.
    """
    if device == "cuda":
        return float(_torch().cuda.mem_get_info()[0]) / 2**30
    if device != "cpu":
        return None
    free = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                free.append(1024 * int(line.split()[1]))
    except OSError:
        free.append(round(_memory_gib() * 2**30))
    for limit, used in zip(_CGROUP_MEMORY, _CGROUP_USED, strict=True):
        found = [_number(Path(path)) for path in (limit, used)]
        if found[0] is not None and found[1] is not None:
            free.append(max(0, found[0] - found[1]))
    return min(free) / 2**30 if free else None


def _number(path: Path) -> int | None:
    """The number that a file of the kernel holds; None for no file, or no limit."""
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def _torch() -> Any:
    import torch

    return torch
