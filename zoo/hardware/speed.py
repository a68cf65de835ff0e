"""How fast this machine is, measured in a few seconds and kept, because a processor's peak cannot be looked up."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.hardware.local import num_cpus
from zoo.plan.local import Rates

if TYPE_CHECKING:
    import torch

    from zoo.spec.hardware import ChipSpec

_FORMAT = 2
"""Raised when the same machine would be measured otherwise."""
_BUDGET_S = 0.4
"""For the products of one dtype."""
_SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)
_LARGE_ENOUGH_S = _BUDGET_S / 20
"""A product that takes this long hides what a call costs."""
_COPY_BYTES = 1 << 28
"""More than a cache holds."""
_COPIES = 4


@dataclass(frozen=True)
class Speed:
    """The best that was seen on this machine."""

    tflops: dict[str, float]
    """Product of two square matrices, by dtype (`fp32`, `bf16`); without the dtypes that the device cannot multiply."""
    memory_gb_s: float
    """Copying memory: bytes read plus bytes written, in 10**9 a second."""
    rates: Rates | None = None
    """Of single operations; None for devices other than processors, whose work is not predicted one by one."""


def measure(chip: ChipSpec) -> Speed:
    """The speed of this machine's first device of the kind `chip.device`, from the cache when it is known.

    The cache is `speed-*.json` in `cache_dir()`; a file that cannot be read is measured anew, and a place that cannot
    be written is not needed. What was measured beside other work is measured again once the machine is idle.
    """
    key, busy = _key(chip), _is_busy()
    path = cache_dir() / f"speed-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    speed, was_busy = _read(path, key)
    if speed is None or (was_busy and not busy):
        speed = _measure(chip.device or "cpu")
        write_cache(path, {"machine": key, "busy": busy, **asdict(speed)})
    return speed


def cache_dir() -> Path:
    """Where zoo keeps what it can find out again: `$XDG_CACHE_HOME/zoo`, or `~/.cache/zoo`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "zoo"


def _is_busy() -> bool:
    """Whether other work has taken a good part of the processor during the last minute."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > num_cpus() / 4


def _key(chip: ChipSpec) -> dict[str, Any]:
    """What the speed depends on."""
    import torch

    on_cpu = chip.device in (None, "cpu")
    return {
        "format": _FORMAT,
        "name": chip.name,
        "num_cores": chip.num_cores,
        "memory_gib": chip.memory_gib,
        "torch": torch.__version__,
        "threads": torch.get_num_threads() if on_cpu else None,
        "instructions": torch.backends.cpu.get_cpu_capability() if on_cpu else None,
    }


def _read(path: Path, key: dict[str, Any]) -> tuple[Speed | None, bool]:
    """What is kept for `key`, if it can be made sense of, and whether the machine was busy then."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        tflops = {name: float(value) for name, value in data["tflops"].items()}
        rates = None if data["rates"] is None else Rates(**data["rates"])
        speed = Speed(tflops, float(data["memory_gb_s"]), rates)
        known = data["machine"] == key
        was_busy = bool(data["busy"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, False
    sound = all(math.isfinite(value) and value > 0 for value in (*speed.tflops.values(), speed.memory_gb_s))
    return (speed if known and sound and "fp32" in speed.tflops else None), was_busy


def write_cache(path: Path, data: dict[str, Any]) -> None:
    """At once, so that no other process reads half of it. A place that cannot be written is left alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as draft:
            json.dump(data, draft, indent=1)
        os.replace(draft.name, path)
    except OSError:
        pass


def _measure(device: str) -> Speed:
    import torch

    place = torch.device(device)
    products = {
        name: _matmul_tflops(place, dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    tflops = {name: value for name, value in products.items() if value}
    return Speed(tflops, _copy_gb_s(place), _rates(device))


def _rates(device: str) -> Rates | None:
    if device != "cpu":
        return None
    from zoo.hardware.rates import measure_rates

    return measure_rates()


def _matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a square product, of sizes up to the first that is large enough; 0 if there is none."""
    import torch

    best, deadline = 0.0, time.perf_counter() + _BUDGET_S
    for size in _SIZES:
        try:
            left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
            out = left @ right
        except RuntimeError:  # no such product on this device, or no room for it
            return best
        quickest = math.inf
        while quickest >= _LARGE_ENOUGH_S or math.isinf(quickest):
            quickest = min(quickest, _seconds(device, lambda: torch.mm(left, right, out=out)))  # noqa: B023
            best = max(best, 2 * size**3 / quickest / 1e12)
            if time.perf_counter() > deadline:
                return best
    return best


def _copy_gb_s(device: torch.device) -> float:
    import torch

    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    quickest = min(_seconds(device, lambda: target.copy_(source)) for _ in range(_COPIES))
    return 2 * _COPY_BYTES / quickest / 1e9


def _seconds(device: torch.device, work: Any) -> float:
    """How long `work` takes on the device."""
    import torch

    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start
