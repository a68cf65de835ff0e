"""Elasticities against what they must be where only one resource matters."""

from __future__ import annotations

import math

import pytest

import zoo
from zoo.plan.sensitivity import Effect, Sensitivity


def effects(found: Sensitivity) -> dict[str, Effect]:
    return {effect.resource: effect for effect in found.effects}


@pytest.fixture(scope="module")
def several() -> dict[str, Effect]:
    made = zoo.plan("qwen3_30b_a3b", "h100_8x", "hardware.num_devices=32", "hardware.storage.write_gb_s=20")
    return effects(made.sensitivity())


def test_more_of_anything_is_never_slower(several: dict[str, Effect]) -> None:
    assert set(several) == {
        "compute", "memory bandwidth", "memory size", "fast-domain links", "network", "domain size", "storage",
    }  # fmt: skip
    for effect in several.values():
        assert effect.elasticity <= 1e-9
        if effect.more is not None and effect.fewer is not None:
            assert effect.more.step_time_s <= effect.fewer.step_time_s


def test_rates_scale_together(several: dict[str, Effect]) -> None:
    """All rates of a machine twice as fast halve all but fixed times: elasticities sum to at most one."""
    rates = ("compute", "memory bandwidth", "fast-domain links", "network")
    total = -sum(several[name].fixed_elasticity for name in rates)
    assert 0.5 < total <= 1.0 + 1e-6


def test_size_does_nothing_while_the_layout_stays(several: dict[str, Effect]) -> None:
    assert several["memory size"].fixed_elasticity == 0
    assert several["memory size"].elasticity < 0


def test_changes_are_plans(several: dict[str, Effect]) -> None:
    for resource, factor, override in (
        ("memory size", 0.5, "hardware.chip.memory_gib=40"),
        ("network", 1.1, "hardware.scale_out_gbit_s=440"),
        ("domain size", 2.0, "hardware.domain_size=16"),
    ):
        effect = several[resource]
        change = effect.fewer if factor < 1 else effect.more
        made = zoo.plan("qwen3_30b_a3b", "h100_8x", "hardware.num_devices=32", override)
        assert change is not None
        assert change.factor == factor
        assert change.step_time_s == pytest.approx(made.step_time_s, rel=1e-6)
        assert change.layout == made.layout


def test_storage_counts_what_checkpoints_add(several: dict[str, Effect]) -> None:
    share = 30_532_122_624 * 12 / 20e9 / 3600
    assert several["storage"].elasticity == pytest.approx(-share / (1 + share), rel=0.01)  # whole steps of an hour
    assert "stated" in several["storage"].note


def test_one_device_has_no_links() -> None:
    found = effects(zoo.plan("qwen3_0_6b", "rtx4090").sensitivity())
    assert "assumed" in found["storage"].note
    for name in ("fast-domain links", "network", "domain size"):
        assert math.isnan(found[name].elasticity)
        assert found[name].note
    assert -1 <= found["compute"].elasticity < -0.2


def test_nothing_fits_with_less() -> None:
    effect = effects(zoo.plan("llama3_8b", "h100_8x", "hardware.num_devices=4").sensitivity())["memory size"]
    small = effects(zoo.plan("llama3_8b", "h100_8x", "hardware.num_devices=2").sensitivity())["memory size"]
    assert effect.fewer is not None
    assert small.fewer is not None
    assert math.isinf(small.fewer.step_time_s)
    assert math.isfinite(small.elasticity)
