"""Budgets against arithmetic by hand, and the scaling law against its own minimum."""

from __future__ import annotations

import math

import pytest

import zoo
from zoo.plan.budget import budget, compute_optimal, loss
from zoo.plan.checkpoints import assumed_write_gb_s, checkpoints
from zoo.plan.plan import Plan


@pytest.fixture(scope="module")
def made() -> Plan:
    return zoo.plan("llama3_8b", "h100_8x", "hardware.storage.write_gb_s=10")


def test_run_of_some_tokens(made: Plan) -> None:
    found = budget(made, tokens=15e12, price_per_device_hour=2.5, pue=1.2)
    written_s = 8_030_261_248 * 12 / 10e9  # 12 bytes a parameter about every hour, while training waits
    every = round(3600 / made.step_time_s)
    share = written_s / (every * made.step_time_s)
    hours = 15e12 / (8 * made.tokens_per_s_per_device) / 3600 * (1 + share)
    assert found.tokens == 15e12
    assert found.days == pytest.approx(hours / 24)
    assert found.device_hours == pytest.approx(8 * hours)
    assert found.energy_mwh == pytest.approx(8 * 700 * 1.2 * hours / 1e6)
    assert found.cost == pytest.approx(8 * hours * 2.5)
    assert found.flops == pytest.approx(15e12 * made.best.flops.training)
    assert found.checkpoints.every == every
    assert found.checkpoints.share == pytest.approx(share)
    assert not found.checkpoints.assumed


def test_checkpoints_in_the_background_wait_for_the_copy_alone(made: Plan) -> None:
    size = 8_030_261_248 * 12
    waiting, behind = checkpoints(made, every=100), checkpoints(made, every=100, background=True)
    assert waiting.wait_s == waiting.write_s == behind.write_s == pytest.approx(size / 10e9)
    assert behind.wait_s == pytest.approx(size / 8 / 64e9)  # eight devices, 64 GB/s each to their host
    slow = checkpoints(made, every=1, background=True, storage_factor=1e-3)
    assert slow.wait_s == pytest.approx(slow.write_s - made.step_time_s + behind.wait_s)  # the next is due before


@pytest.mark.parametrize(("devices", "gb_s"), [(1, 4), (8, 4), (16, 8), (40, 20), (256, 20), (1024, 80)])
def test_storage_that_is_not_stated(devices: int, gb_s: float) -> None:
    machine = zoo.plan.estimate.load_hardware("h100_8x").replace(num_devices=devices)
    assert assumed_write_gb_s(machine) == gb_s


@pytest.mark.parametrize("name", ["days", "device_hours", "energy_mwh", "cost"])
def test_inverse(made: Plan, name: str) -> None:
    there = budget(made, tokens=1e12, price_per_device_hour=3.0)
    back = budget(made, price_per_device_hour=3.0, **{name: getattr(there, name)})
    assert back.tokens == pytest.approx(1e12)
    both = budget(made, price_per_device_hour=3.0, tokens=5e11, **{name: getattr(there, name)})
    assert both.tokens == 5e11  # what is used up first


def test_optimum_of_the_law_is_one() -> None:
    flops = 1e23
    size, tokens = compute_optimal(flops)
    assert 6 * size * tokens == pytest.approx(flops)
    least = loss(size, tokens)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert loss(size * factor, tokens / factor) > least
    # arXiv:2404.10102: about 20 tokens a parameter at Chinchilla's own 5.76e23 FLOPs
    size, tokens = compute_optimal(5.76e23)
    assert 15 < tokens / size < 25
    assert 60e9 < size < 80e9


def test_loss_falls_to_its_floor() -> None:
    assert loss(math.inf, math.inf) == pytest.approx(1.8172)
    assert loss(1e9, 1e10) > loss(1e10, 1e10) > loss(1e10, 1e11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "budget: found nothing"),
        ({"tokens": -1.0}, "tokens: found -1.0; must be a positive number"),
        ({"cost": 5.0}, "price_per_device_hour: a budget of money needs it"),
    ],
)
def test_budgets_that_say_too_little(made: Plan, options: dict[str, float], message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message):
        budget(made, **options)
