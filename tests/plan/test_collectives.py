"""Collectives: groups on links, and nothing gets slower by a faster link."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.plan.collectives import Links, distinct, exchange_seconds, inside, ring_byte_s, ring_seconds
from zoo.plan.layout import Array

GROUP = st.sampled_from([1, 2, 4, 8, 16, 64])


def one(value: float) -> Array:
    return np.array([float(value)])


LINKS = Links(one(8), one(400e9), one(50e9), one(1e-5))


def test_groups_that_fit_stay_on_fast_links() -> None:
    assert inside(one(8), one(1), LINKS)[0] == 8
    assert ring_byte_s(one(8), one(1), LINKS)[0] == 400e9


def test_each_member_in_a_domain_brings_its_adapter() -> None:
    assert inside(one(4), one(8), LINKS)[0] == 1  # one member in every domain of eight
    assert ring_byte_s(one(4), one(8), LINKS)[0] == 50e9
    assert inside(one(16), one(2), LINKS)[0] == 4  # every second device
    assert ring_byte_s(one(16), one(2), LINKS)[0] == 200e9
    assert ring_byte_s(one(64), one(1), LINKS)[0] == 400e9  # never beyond the fast links


def test_a_ring_takes_its_bytes_and_its_start() -> None:
    assert ring_seconds(one(4e9), one(2), one(8), one(1), LINKS)[0] == pytest.approx(0.01 + 2 * 1e-5 * 4)
    assert ring_seconds(one(4e9), one(2), one(1), one(1), LINKS)[0] == 0


@pytest.mark.parametrize(("choices", "targets"), [(1, 8), (8, 8), (8, 64), (4, 1)])
def test_distinct_targets_against_throwing(choices: int, targets: int) -> None:
    thrown = np.random.default_rng(0).integers(0, targets, (20000, choices))
    mean = np.mean([len(set(row)) for row in thrown.tolist()])
    assert distinct(one(choices), one(targets))[0] == pytest.approx(mean, rel=0.01)


def test_one_choice_to_distinct_domains_is_counted_by_hand() -> None:
    # 64 experts' devices in 8 domains, one choice: 56 of 64 tokens leave the domain, 7 of the 8 others go to neighbours
    links = replace(LINKS, start_s=one(0))
    each = 1e9  # bytes of all tokens of a device, once
    taken = exchange_seconds(one(each * 63 / 64), one(1), one(64), one(1), one(1), links)[0]
    assert taken == pytest.approx(each * 7 / 64 / 400e9 + each * 7 / 8 / 50e9, rel=0.02)


@given(GROUP, GROUP, st.floats(1, 8), st.sampled_from(["near_byte_s", "far_byte_s", "domain"]))
def test_better_links_are_never_slower(group: int, stride: int, factor: float, name: str) -> None:
    better = replace(LINKS, **{name: np.floor(getattr(LINKS, name) * factor)})
    calls, size = one(3), one(1e9)
    before = ring_seconds(size, calls, one(group), one(stride), LINKS)
    assert ring_seconds(size, calls, one(group), one(stride), better)[0] <= before[0] * (1 + 1e-9)
    if name != "domain":
        before = exchange_seconds(size, calls, one(group), one(1), one(8), LINKS)
        assert exchange_seconds(size, calls, one(group), one(1), one(8), better)[0] <= before[0] * (1 + 1e-9)
