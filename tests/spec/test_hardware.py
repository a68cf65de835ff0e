"""Hardware profiles: what the files say, against what makers print, and how a command line changes it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import zoo.conf
from zoo.config import compose, compose_once, list_hardware
from zoo.spec.base import ConfigError, decode
from zoo.spec.hardware import ChipSpec, HardwareSpec, KernelsSpec, PrecisionSpec
from zoo.spec.run import decode_run

CONF = Path(zoo.conf.__file__).parent
CHIPS = sorted(path.stem for path in (CONF / "hardware/chip").glob("*.yaml"))
NO_CLAIMS = {"unknown", "cpu"}


@cache
def profile(name: str, *overrides: str) -> dict[str, Any]:
    """What `hardware=name` brings: hardware, precision and kernels as plain data."""
    cfg, _ = compose_once(None, [f"+hardware={name}", *overrides])
    data = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(data, dict)
    return data


def machine(name: str, *overrides: str) -> HardwareSpec:
    return decode(HardwareSpec, profile(name, *overrides)["hardware"], "hardware")


@cache
def chip(name: str) -> ChipSpec:
    data = OmegaConf.to_container(OmegaConf.load(CONF / f"hardware/chip/{name}.yaml"))
    assert isinstance(data, dict)
    data.pop("defaults", None)
    return decode(ChipSpec, data, name)


def leaves(data: dict[str, Any], path: str = "") -> set[str]:
    return {
        leaf
        for key, value in data.items()
        for leaf in (leaves(value, f"{path}{key}.") if isinstance(value, dict) and value else {path + key})
    }


@pytest.mark.parametrize("name", list_hardware())
def test_profile_is_sound_and_every_fact_of_it_can_be_overridden(name: str) -> None:
    data = profile(name)
    found = decode(HardwareSpec, data["hardware"], "hardware")
    assert found.name == name
    assert decode(HardwareSpec, found.to_dict()) == found
    without_marks = data["hardware"] | {"marks": {}, "chip": data["hardware"]["chip"] | {"marks": {}}}
    blank = HardwareSpec(name="", chip=ChipSpec(name="")).to_dict()
    assert leaves(without_marks) == leaves(blank)
    decode(PrecisionSpec, data["precision"])
    decode(KernelsSpec, data["kernels"])
    if not found.detect:
        assert found.domain_size >= found.num_devices
        assert found.sources


def test_there_are_profiles_of_what_people_have() -> None:
    wanted = """auto cpu rtx4090 rtx5090 dgx_spark l40s a100_8x a100_40_8x h100_8x h200_8x h800_8x b200_8x b300_8x
    gb200_nvl72 gb300_nvl72 vera_rubin_nvl72 mi300x_8x mi325x_8x mi355x_8x tpu_v5p tpu_v6e tpu_v7 m4_max""".split()
    assert set(wanted) <= set(list_hardware())
    assert len(list_hardware()) >= 30
    assert {machine(name).chip.name for name in list_hardware()} == {chip(name).name for name in CHIPS}


@pytest.mark.parametrize("name", sorted({*CHIPS} - NO_CLAIMS))
def test_chip_has_sources_and_believable_facts(name: str) -> None:
    facts = chip(name)
    assert facts.sources
    assert facts.device
    peaks = facts.tflops
    assert peaks.bf16
    ladder = [peaks.fp32, peaks.bf16, peaks.fp8, peaks.fp4]
    stated = [peak for peak in ladder if peak is not None]
    assert stated == sorted(stated)
    assert facts.memory_gib
    assert facts.memory_gb_s
    # Machine balance: what a chip can compute for each byte that it reads.
    assert 10 < 1000 * peaks.bf16 / facts.memory_gb_s < 1000
    pair, all_ports = facts.scale_up.pair_gb_s, facts.scale_up.gb_s
    assert pair is None or (all_ports and pair < all_ports)


@pytest.mark.parametrize("name", sorted(NO_CLAIMS))
def test_a_chip_without_claims_makes_none(name: str) -> None:
    facts = chip(name)
    assert facts == ChipSpec(name=facts.name, device=facts.device)


# From the makers' datasheets: dense bf16 TFLOP/s, memory GB/s, power W.
PRINTED = {
    "a100_sxm": (312, 2039, 400),
    "h100_sxm": (989, 3350, 700),
    "h200_sxm": (989, 4800, 700),
    "b200": (2250, 8000, 1000),
    "rtx4090": (165.2, 1008, 450),
    "l40s": (362, 864, 350),
    "mi300x": (1307, 5300, 750),
    "mi355x": (2500, 8000, 1400),
}


@pytest.mark.parametrize("name", PRINTED)
def test_chip_is_as_its_maker_prints(name: str) -> None:
    facts = chip(name)
    assert (facts.tflops.bf16, facts.memory_gb_s, facts.power_w) == PRINTED[name]


def test_what_is_only_announced_is_marked() -> None:
    assert {name for name in CHIPS if chip(name).announced} == {"rubin", "mi455x"}


def test_no_two_chips_are_reported_by_one_name() -> None:
    names = [name.lower() for stem in CHIPS for name in chip(stem).reported_as]
    assert len(names) == len(set(names)) > 20


def test_facts_chips_and_sizes_are_overrides() -> None:
    changed = machine(
        "h100_8x",
        "hardware.chip.memory_gib=288",
        "hardware.chip.tflops.fp4=5000",
        "hardware.num_devices=256",
        "hardware.storage.write_gb_s=40",
    )
    assert (changed.chip.memory_gib, changed.chip.tflops.fp4, changed.storage.write_gb_s) == (288, 5000, 40)
    assert (changed.chip.tflops.bf16, changed.num_domains) == (989, 32)
    assert machine("h100_8x", "hardware/chip=h200_sxm").chip == chip("h200_sxm")
    assert machine("gb300_nvl72", "hardware.num_devices=256").num_domains == 4


def test_a_machine_brings_precision_and_kernels_that_stay_overridable_by_name() -> None:
    own = profile("h100_8x")
    assert (own["precision"]["compute"], own["kernels"]["experts"]) == ("bf16", "grouped_mm")
    cfg = compose(["hardware=h100_8x", "precision=fp32", "kernels=reference"])
    assert (cfg.precision.compute, cfg.kernels.experts) == ("fp32", "loop")
    assert compose(["hardware=h100_8x", "precision.weights=bf16"]).precision == {"compute": "bf16", "weights": "bf16"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hardware.num_devices=0"], "hardware.num_devices: found 0; input should be greater than 0"),
        (["hardware.chip.memory_gib=much"], "hardware.chip.memory_gib: found 'much'"),
        (["hardware=h100"], "hardware: found 'h100'"),
        (["hardware.chip.memory_gb=80"], "hardware.chip.memory_gb: unknown key; did you mean memory_gib"),
        (["+hardware.chip.marks={memory_gig: recalled}"], "hardware.chip.marks: found 'memory_gig'"),
        (["precision=fp32", "precision.weights=bf16"], "precision.weights: found 'bf16'; must be fp32"),
        (["kernels.experts=fast"], "kernels.experts: found 'fast'"),
    ],
)
def test_a_mistake_ends_in_one_clear_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        decode_run(compose(overrides))
    (line,) = str(error.value).splitlines()
    assert line.startswith(message)
