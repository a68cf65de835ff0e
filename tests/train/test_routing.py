"""Routing health: known values and what must hold for any load."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.train.routing import layer_health, summary

LOADS = st.lists(st.integers(0, 10**6), min_size=2, max_size=64)
NUM_EXPERTS = st.integers(2, 64)
COUNT = st.integers(1, 10**9)


def test_known_values() -> None:
    health = layer_health(3, [6, 2, 0, 0])
    assert health.layer == 3
    assert health.load == (6, 2, 0, 0)
    assert health.entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))
    assert health.max_violation == pytest.approx(2.0)
    assert health.num_dead == 2


@given(NUM_EXPERTS, COUNT)
def test_an_even_load_is_perfect(num_experts: int, count: int) -> None:
    health = layer_health(0, [count] * num_experts)
    assert (health.entropy, health.max_violation, health.num_dead) == (pytest.approx(1), pytest.approx(0), 0)


@given(NUM_EXPERTS, COUNT)
def test_a_collapsed_load_is_the_worst(num_experts: int, count: int) -> None:
    health = layer_health(0, [0] * (num_experts - 1) + [count])
    assert (health.entropy, health.num_dead) == (0, num_experts - 1)
    assert health.max_violation == pytest.approx(num_experts - 1)


@given(LOADS, st.randoms(use_true_random=False))
def test_the_order_of_the_experts_does_not_matter(load: list[int], draw: random.Random) -> None:
    shuffled = load.copy()
    draw.shuffle(shuffled)
    one, other = layer_health(0, load), layer_health(0, shuffled)
    assert one.entropy == pytest.approx(other.entropy)
    assert (one.max_violation, one.num_dead) == (other.max_violation, other.num_dead)


@given(LOADS, st.integers(2, 1000))
def test_bounds_and_independence_of_scale(load: list[int], factor: int) -> None:
    health, scaled = layer_health(0, load), layer_health(0, [count * factor for count in load])
    assert 0 <= health.entropy <= 1
    assert -1e-12 <= health.max_violation <= len(load) - 1 + 1e-9
    assert health.num_dead == load.count(0)
    assert scaled.entropy == pytest.approx(health.entropy)
    assert scaled.max_violation == pytest.approx(health.max_violation)


@pytest.mark.parametrize(("load", "expected"), [([5], (1.0, 0.0, 0)), ([0, 0, 0], (0.0, 0.0, 3)), ([0], (0.0, 0.0, 1))])
def test_the_ends_of_the_definition(load: list[int], expected: tuple[float, float, int]) -> None:
    health = layer_health(0, np.array(load))
    assert (health.entropy, health.max_violation, health.num_dead) == expected
    assert all(type(count) is int for count in health.load)


@pytest.mark.parametrize("load", [[], [-1, 2], [[1, 2]], [0.5, 0.5]])
def test_what_is_no_load(load: list[float]) -> None:
    with pytest.raises(ValueError, match="one per expert"):
        layer_health(0, load)


def test_summary() -> None:
    layers = [layer_health(2, [1, 1]), layer_health(5, [2, 0]), layer_health(7, [0, 2])]
    total = summary(layers)
    assert (total.mean_entropy, total.worst_max_violation, total.worst_layer, total.num_dead) == (1 / 3, 1.0, 5, 2)
