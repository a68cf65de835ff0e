"""Kernels: never faster than the chip, slower when narrow or short, and close to measured tables."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.plan.kernels import attention_seconds, beyond, product_seconds, smooth_max

PEAK, REACH, BYTES = 989e12, 0.82, 3.35e12 * 0.8
SIZE = st.integers(1, 1 << 15)


def seconds(m: float, n: float, k: float, stack: float = 0.0) -> float:
    arguments = [np.array([float(value)]) for value in (m, n, k, stack)]
    return float(product_seconds(*arguments, np.array([PEAK * REACH]), np.array([BYTES]))[0])


@given(SIZE, SIZE, SIZE)
def test_products_are_no_faster_than_arithmetic_and_memory_allow(m: int, n: int, k: int) -> None:
    assert seconds(m, n, k) >= 2 * m * n * k / (PEAK * REACH)
    assert seconds(m, n, k) >= 2 * (m * k + m * n + n * k) / BYTES


@given(SIZE, SIZE, SIZE)
def test_more_rows_take_longer(m: int, n: int, k: int) -> None:
    assert seconds(m + 1, n, k) > seconds(m, n, k)


@given(st.integers(64, 4096), st.sampled_from([2, 8, 64]))
def test_experts_are_no_faster_than_one_product_of_all_rows(rows: int, experts: int) -> None:
    assert seconds(rows * experts, 2048, 2048, experts) > seconds(rows * experts, 2048, 2048)


def test_one_expert_is_still_an_expert() -> None:
    alone, grouped = seconds(8192, 4096, 4096), seconds(8192, 4096, 4096, 1)
    assert alone < grouped < 1.6 * alone  # as others of its size: arithmetic and traffic one after the other


@pytest.mark.parametrize("inside", [512, 1024, 2048, 4096, 8192, 16384])
def test_experts_follow_the_measured_table(inside: int) -> None:
    # B200, bf16, width 6144, the best of at least 1024 rows: kernel_moe_measured.csv.gz, whole mixtures of experts
    best = {512: 0.39, 1024: 0.58, 2048: 0.75, 4096: 0.80, 8192: 0.82, 16384: 0.83}[inside]
    peak, byte_s, rows, experts = 2250e12, 0.8 * 8e12, 2048.0, 8.0
    each = (np.array([rows * experts]), np.array([experts]), np.array([0.82 * peak]), np.array([byte_s]))
    m, stack, flop_s, bandwidth = each
    up = product_seconds(m, np.array([2.0 * inside]), np.array([6144.0]), stack, flop_s, bandwidth)
    down = product_seconds(m, np.array([6144.0]), np.array([float(inside)]), stack, flop_s, bandwidth)
    moved = 8.0 * rows * experts * 6144 / byte_s  # to experts and back, a read and a write of bf16 each
    fraction = 6 * rows * experts * 6144 * inside / float((up + down)[0] + moved) / peak
    assert 0.6 * best < fraction < 1.1 * best


@pytest.mark.parametrize(  # H100, bf16, median fraction of the peak by GFLOP (throughput_notes.md, section 3.1)
    ("gflop", "fraction"), [(1, 0.20), (4, 0.43), (16, 0.63), (64, 0.79), (256, 0.83), (1024, 0.82)]
)
def test_square_products_follow_the_measured_table(gflop: float, fraction: float) -> None:
    side = (gflop * 1e9 / 2) ** (1 / 3)
    assert gflop * 1e9 / seconds(side, side, side) / PEAK == pytest.approx(fraction, rel=0.16)


@pytest.mark.parametrize(  # m 8192, the other 4096: the range over shapes, with a tenth of slack
    ("narrow", "low", "high"), [(128, 0.25, 0.40), (256, 0.40, 0.70), (512, 0.57, 0.85), (2048, 0.7, 0.85)]
)
def test_narrow_products_lose_what_was_measured(narrow: int, low: float, high: float) -> None:
    assert low <= 2 * 8192 * 4096 * narrow / seconds(8192, narrow, 4096) / PEAK <= high


@pytest.mark.parametrize(("seq_len", "fraction"), [(1024, 0.37), (4096, 0.61), (8192, 0.68), (16384, 0.71)])
def test_attention_follows_the_measured_table(seq_len: int, fraction: float) -> None:
    flops = np.array([1e12])
    taken = attention_seconds(flops, np.array([float(seq_len)]), np.array([128.0]), np.array([PEAK]), np.array([0.74]))
    assert flops[0] / taken[0] / PEAK == pytest.approx(fraction, rel=0.08)


@given(st.floats(0.0, 1e3), st.floats(1e-3, 1e3))
def test_what_is_hidden_is_between_all_and_nothing(time: float, hidden: float) -> None:
    left = float(beyond(np.array([time]), np.array([hidden]))[0])
    assert max(0.0, time - hidden) - 1e-9 * hidden <= left <= time + 1e-9 * hidden
    assert float(smooth_max(np.array([time]), np.array([hidden]))[0]) >= max(time, hidden) * (1 - 1e-12)
