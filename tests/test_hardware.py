"""Finding out what this machine is and how fast it is."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zoo.hardware import Speed, local_hardware, measure
from zoo.hardware.local import available_gib, chip_reported_as
from zoo.hardware.speed import cache_dir
from zoo.plan.local import Rates
from zoo.spec.base import ConfigError
from zoo.spec.hardware import ChipSpec, HardwareSpec

AUTO = HardwareSpec(name="auto", detect=True, chip=ChipSpec(name="unknown"))
CPU = HardwareSpec(name="cpu", detect=True, chip=ChipSpec(name="CPU", device="cpu"))
SPEED = Speed({"fp32": 0.25, "bf16": 0.5}, 20.0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    return tmp_path / "zoo"


@pytest.fixture
def measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Devices that were measured, in order; measuring gives `SPEED` at once."""
    devices: list[str] = []

    def instantly(device: str) -> Speed:
        devices.append(device)
        return SPEED

    monkeypatch.setattr("zoo.hardware.speed._measure", instantly)
    return devices


def test_the_processor_is_found() -> None:
    chip = local_hardware(CPU).chip
    assert chip.device == "cpu"
    assert chip.name not in ("", "CPU", "unknown")
    assert 1 <= (chip.num_cores or 0) <= (os.cpu_count() or 1)
    assert chip.memory_gib
    assert 0 < chip.memory_gib * 2**30 <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 1.01


def test_what_the_settings_state_is_not_overwritten() -> None:
    chip = ChipSpec(name="CPU", device="cpu", memory_gib=4, marks={"memory_gib": "derived"})
    found = local_hardware(CPU.replace(chip=chip, scale_out_gbit_s=10.0))
    assert (found.chip.memory_gib, found.chip.marks, found.scale_out_gbit_s) == (4, {"memory_gib": "derived"}, 10)
    assert found.chip.num_cores


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_a_profile_of_another_machine_is_refused() -> None:
    rtx = HardwareSpec(name="rtx4090", chip=ChipSpec(name="NVIDIA GeForce RTX 4090", device="cuda"))
    with pytest.raises(ConfigError, match=r"^hardware: found 'rtx4090'.*; this machine has .*cpu.*; use hardware=auto"):
        local_hardware(rtx)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    properties = SimpleNamespace(name=name, total_memory=40 * 2**30, multi_processor_count=77)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


def test_a_known_gpu_gets_the_facts_of_its_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "NVIDIA H100 80GB HBM3")
    chip = local_hardware(AUTO.replace(chip=ChipSpec(name="unknown", power_w=500, tflops={"fp8": 1500.0}))).chip
    assert (chip.name, chip.device, chip.num_cores) == ("NVIDIA H100 SXM 80 GB", "cuda", 132)
    assert (chip.tflops.bf16, chip.tflops.fp8, chip.memory_gib, chip.power_w) == (989, 1500, 80, 500)


def test_an_unknown_gpu_gets_what_its_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, "NVIDIA GeForce RTX 4090 Laptop GPU")
    chip = local_hardware(AUTO).chip
    assert (chip.name, chip.memory_gib, chip.num_cores) == ("NVIDIA GeForce RTX 4090 Laptop GPU", 40, 77)
    assert chip.tflops.bf16 is None


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 SXM 80 GB"),
        ("NVIDIA A100-PCIe-40GB", "NVIDIA A100 PCIe 40 GB"),
        ("NVIDIA H200", "NVIDIA H200 SXM 141 GB"),
        ("NVIDIA H200 NVL", "NVIDIA H200 NVL 141 GB"),
        ("NVIDIA GH200 480GB", "NVIDIA GH200 96 GB"),
        ("AMD Instinct MI300X OAM", "AMD Instinct MI300X"),
        ("NVIDIA H20-3e", None),
        ("NVIDIA", None),
        ("GeForce", None),
    ],
)
def test_a_chip_is_recognised_by_its_whole_name(reported: str, name: str | None) -> None:
    chip = chip_reported_as(reported)
    assert (chip and chip.name) == name


def test_speed_is_measured_once(measured: list[str], cache: Path) -> None:
    chip = local_hardware(CPU).chip
    assert cache_dir() == cache
    assert measure(chip) == measure(chip) == SPEED
    assert measured == ["cpu"]
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_other_threads_cores_or_chips_are_measured_anew(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    chip = local_hardware(CPU).chip
    measure(chip)
    for other in (chip.replace(name="another"), chip.replace(num_cores=1000), chip.replace(device="cuda")):
        measure(other)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    measure(chip)
    assert measured == ["cpu", "cpu", "cpu", "cuda", "cpu"]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: None,
        lambda data: [data],
        lambda data: data | {"tflops": {"fp32": float("nan")}},
        lambda data: data | {"tflops": {"fp32": -1.0}},
        lambda data: data | {"tflops": {}},
        lambda data: data | {"memory_gb_s": "fast"},
        lambda data: data | {"machine": {}},
        lambda data: {key: value for key, value in data.items() if key != "busy"},
    ],
)
def test_a_damaged_cache_is_measured_anew(measured: list[str], cache: Path, change: Any) -> None:
    chip = local_hardware(CPU).chip
    measure(chip)
    (path,) = cache.iterdir()
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert measure(chip) == measure(chip) == SPEED
    assert measured == ["cpu", "cpu"]
    path.write_text(path.read_text()[:-5])
    assert measure(chip) == SPEED
    assert len(measured) == 3


def test_a_cache_that_cannot_be_written_is_not_needed(measured: list[str], cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert measure(local_hardware(CPU).chip) == SPEED


def test_a_relative_cache_home_is_ignored_as_its_standard_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_dir() == Path.home() / ".cache/zoo"


def test_what_was_measured_on_a_busy_machine_is_measured_again_on_an_idle_one(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = local_hardware(CPU).chip
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0), raising=False)
    assert measure(chip) == measure(chip) == SPEED
    assert len(measured) == 1
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert measure(chip) == measure(chip) == SPEED
    assert len(measured) == 2


def test_the_measured_speed_is_that_of_plain_products(cache: Path) -> None:
    speed = measure(local_hardware(CPU).chip)
    matrix = torch.randn(1024, 1024)
    quickest = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        matrix @ matrix
        quickest = min(quickest, time.perf_counter() - start)
    assert 0.2 < speed.tflops["fp32"] / (2 * 1024**3 / quickest / 1e12) < 5
    assert speed.tflops["bf16"] > 0
    assert 0.5 < speed.memory_gb_s < 5000


def test_free_memory_is_what_the_kernel_and_the_container_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = available_gib("cpu")
    assert free is not None
    assert 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr("zoo.hardware.local._CGROUP_MEMORY", (str(limit),))
    monkeypatch.setattr("zoo.hardware.local._CGROUP_USED", (str(used),))
    limit.write_text(f"{2**28}\n")
    used.write_text(f"{2**27}\n")
    assert available_gib("cpu") == 0.125
    limit.write_text("max\n")
    assert available_gib("cpu") == pytest.approx(free, rel=0.5)
    assert available_gib("mps") is None


def test_rates_survive_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = Rates(
        op_s=1e-6, curves={"stream": [[1.0, 2.0]]}, products=[[1.0, 2.0, 3.0, 4.0, 5.0]], clip=[1.0, 2.0, 3.0]
    )
    monkeypatch.setattr("zoo.hardware.speed._measure", lambda device: Speed({"fp32": 0.2}, 10.0, rates))
    chip = local_hardware(CPU).chip
    assert measure(chip).rates == rates
    monkeypatch.setattr("zoo.hardware.speed._measure", None)
    found = measure(chip).rates
    assert found is not None
    assert (found.op_s, found.curves, found.products) == (1e-6, {"stream": [[1.0, 2.0]]}, [[1.0, 2.0, 3.0, 4.0, 5.0]])
