"""Budgets against arithmetic by hand, and the scaling law against its own minimum."""

from __future__ import annotations

import math

import pytest

import zoo
from zoo.plan.budget import budget, compute_optimal, loss
from zoo.plan.plan import Plan


@pytest.fixture(scope="module")
def made() -> Plan:
    return zoo.plan("llama3_8b", "h100_8x", "hardware.storage.write_gb_s=10")


def test_run_of_some_tokens(made: Plan) -> None:
    found = budget(made, tokens=15e12, price_per_device_hour=2.5, pue=1.2)
    hours = 15e12 / (8 * made.tokens_per_s_per_device) / 3600
    assert found.tokens == 15e12
    assert found.days == pytest.approx(hours / 24)
    assert found.device_hours == pytest.approx(8 * hours)
    assert found.energy_mwh == pytest.approx(8 * 700 * 1.2 * hours / 1e6)
    assert found.cost == pytest.approx(8 * hours * 2.5)
    assert found.flops == pytest.approx(15e12 * made.best.flops.training)
    # 12 bytes a parameter every hour, while training waits
    assert found.checkpoint_share == pytest.approx(8_030_261_248 * 12 / 10e9 / 3600)


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
