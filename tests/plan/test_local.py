"""The time of a step of zoo's own training, from operations and what each takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.plan.local import IN_TRAINING, Op, Rates, StepOps, seconds_of, step_seconds

RATES = Rates(
    op_s=1e-6,
    plain_op_s=5e-7,
    curves={"stream": [(1e3, 1e-7), (1e6, 1e-4), (1e8, 2e-2)], "math": [(1e3, 1e-6), (1e6, 1e-3)]},
    products=[
        (stack, m, n, k, 2.0 * stack * m * n * k * 1e-11 * (1 + 8 / m + 8 / n + 16 / k))
        for stack in (1, 16)
        for m, n, k in ((512, 512, 512), (16, 512, 512), (512, 8, 512), (512, 512, 16), (64, 64, 64))
    ],
    attention={
        name: [
            (queries, width, 1e-10 * (1 + 100 / queries + 8 / width)) for queries in (64, 1024) for width in (32, 128)
        ]
        for name in ("causal", "masked", "causal_back", "masked_back")
    },
    fresh_byte_s=1e-9,
    adamw=(1e-9, 1e-6, 1e-4),
    clip=(1e-9, 1e-6, 1e-4),
)
OPS = StepOps(
    passes={Op("view"): 10, Op("stream", (1000,)): 4, Op("product", (1, 256, 128, 64)): 2},
    layers_again={Op("stream", (1000,)): 1},
    update={Op("product", (1, 128, 128, 128)): 3},
    fused_elements=1000,
    fused_tensors=10,
    elements=5000,
    tensors=20,
)


@given(m=st.integers(1, 4096), n=st.integers(1, 4096), k=st.integers(1, 4096), stack=st.sampled_from([1, 8]))
def test_products_follow_the_samples_they_were_measured_by(m: int, n: int, k: int, stack: int) -> None:
    expected = 2.0 * stack * m * n * k * 1e-11 * (1 + 8 / m + 8 / n + 16 / k)
    assert RATES.seconds(Op("product", (stack, m, n, k))) == pytest.approx(expected, rel=1e-6)


def test_attention_follows_its_samples() -> None:
    expected = 12 * 256 * 256 * 64 * 1e-10 * (1 + 100 / 256 + 8 / 64)
    for kind in ("attend", "attend_back"):
        for causal in (0, 1):
            assert RATES.seconds(Op(kind, (12, 256, 256, 64, causal))) == pytest.approx(expected, rel=1e-6)


def test_curves_meet_their_points_and_go_on_at_the_last_rate() -> None:
    for size, seconds in RATES.curves["stream"]:
        assert RATES.seconds(Op("stream", (int(size),))) == pytest.approx(seconds)
    assert RATES.seconds(Op("stream", (10**9,))) == pytest.approx(10 * 2e-2)
    assert RATES.seconds(Op("stream", (0,))) == 0


def test_every_operation_costs_its_call() -> None:
    parts = seconds_of(OPS.passes, RATES, RATES.op_s)
    assert parts["host"] == pytest.approx(16e-6)
    assert parts["elementwise"] == pytest.approx(4 * 1e-7)
    assert parts["products"] == pytest.approx(2 * RATES.seconds(Op("product", (1, 256, 128, 64))))


def test_a_step_is_its_micro_batches_and_one_update() -> None:
    one, four = step_seconds(OPS, RATES), step_seconds(OPS, RATES, micro_batches=4)
    assert four["products"] == pytest.approx(4 * one["products"])
    assert four["optimizer"] == one["optimizer"]
    assert one["accumulate"] == 0 < four["accumulate"]
    adamw, clip = 1000 * 1e-9 + 10e-6 + 1e-4, 5000 * 1e-9 + 20e-6 + 1e-4
    muon = 3 * (RATES.seconds(Op("product", (1, 128, 128, 128))) + 5e-7)
    assert one["optimizer"] == pytest.approx(IN_TRAINING * (adamw + clip + muon))


def test_recomputing_repeats_the_layers_forward() -> None:
    more = sum(step_seconds(OPS, RATES, again=True).values()) - sum(step_seconds(OPS, RATES).values())
    assert more == pytest.approx(IN_TRAINING * (1e-6 + 1e-7))


def test_slower_products_leave_the_optimizer_alone() -> None:
    plain, slow = step_seconds(OPS, RATES), step_seconds(OPS, RATES, products=3.0)
    assert slow["products"] == pytest.approx(3 * plain["products"])
    assert slow["optimizer"] == plain["optimizer"]
