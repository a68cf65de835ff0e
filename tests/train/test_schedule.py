"""Schedules: pure functions of the step, with known values."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.spec.base import ConfigError, decode
from zoo.spec.train import ConstantSpec, CosineSpec, ScheduleSpec, WSDSpec, duration_in_steps
from zoo.train.schedule import lr_ratio

RATIO = st.floats(0, 1)
DURATION = st.integers(0, 200) | st.floats(0, 0.99)
SPECS = (
    st.builds(CosineSpec, warmup=DURATION, min_ratio=RATIO)
    | st.builds(WSDSpec, warmup=DURATION, decay=DURATION, min_ratio=RATIO)
    | st.builds(ConstantSpec, warmup=DURATION)
)


def ratios(spec: ScheduleSpec, num_steps: int) -> list[float]:
    return [lr_ratio(spec, step, num_steps) for step in range(num_steps)]


def test_cosine_warms_up_and_falls_to_its_minimum() -> None:
    spec = CosineSpec(warmup=4, min_ratio=0.1)
    assert ratios(spec, 104)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lr_ratio(spec, 54, 104) == pytest.approx(0.55)
    assert lr_ratio(spec, 104, 104) == pytest.approx(0.1)


def test_wsd_is_flat_then_a_line() -> None:
    spec = WSDSpec(warmup=2, decay=5, min_ratio=0.0)
    assert ratios(spec, 10) == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_constant_stays() -> None:
    assert ratios(ConstantSpec(warmup=0.5), 4) == [0.5, 1.0, 1.0, 1.0]


def test_durations_are_steps_or_fractions() -> None:
    assert duration_in_steps(7, 100) == 7
    assert duration_in_steps(0.25, 100) == 25


@pytest.mark.parametrize("value", [-1, 1.5, 1.0, True, "10%", None])
def test_other_durations_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"schedule\.warmup: found .*whole number of steps, or a fraction"):
        decode(CosineSpec, {"type": "cosine", "warmup": value}, "schedule")


@given(spec=SPECS, num_steps=st.integers(1, 300))
def test_ratios_lie_between_the_minimum_and_one(spec: ScheduleSpec, num_steps: int) -> None:
    warmup = duration_in_steps(spec.warmup, num_steps)
    values = ratios(spec, num_steps)
    assert all(0 < value <= 1 for value in values[:warmup])
    after = values[warmup:]
    assert all(getattr(spec, "min_ratio", 1.0) - 1e-12 <= value <= 1 for value in after)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
