"""The predicted peak of zoo's own training against what torch's allocator counts while it trains."""

from __future__ import annotations

import pytest

from benchmarks.own_memory import ADAMW, BAR, CASES, OPTIMIZERS, Case, compare
from zoo.plan.own_memory import GIB, PeakMemory, peak_memory
from zoo.plan.tape import KINDS, Tape
from zoo.plan.trunk import named_weights


def predicted(case: Case, **changes: object) -> PeakMemory:
    return peak_memory(case.spec(), **{**case.settings, **changes})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_counters_of_the_allocator(case: Case) -> None:
    measured, found, error = compare(case)
    assert abs(error) <= BAR, (found.parts, found.phase, measured)
    assert found.phase == measured.phase or found.by_phase[measured.phase] == pytest.approx(found.total, rel=0.04)


def test_parts_sum_to_the_total() -> None:
    found = predicted(CASES[0])
    assert tuple(found.parts) == KINDS
    assert found.total == pytest.approx(found.nbytes / GIB)
    assert found.total == max(found.by_phase.values()) == found.by_phase[found.phase]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_trained_weight_has_a_gradient(case: Case) -> None:
    """The optimizer's phase begins with weights, gradients and state alone: their sizes follow from the weights."""
    spec = case.spec()
    sizes = {weight.name: weight.size for weight in named_weights(spec)}
    trained = sum(size for name, size in sizes.items() if ".indexer." not in name)
    found = peak_memory(spec, **{**case.settings, "optimizer": ADAMW, "batch_size": 1, "seq_len": 8})
    held = 4 * sum(sizes.values()) + 3 * 4 * trained
    assert found.by_phase["optimizer"] * GIB == pytest.approx(held, rel=0.01)


def test_recomputing_holds_less() -> None:
    case = Case("llama3_1_70b")
    none, layer = (predicted(case, recompute=recompute) for recompute in ("none", "layer"))
    assert layer.total < none.total
    assert layer.parts["activations"] < 0.6 * none.parts["activations"]


def test_a_third_micro_batch_holds_no_more_than_a_second() -> None:
    two, three, one = (predicted(CASES[0], grad_accumulation=number) for number in (2, 3, 1))
    tokens = 2 * 2 * 64 * 8 / GIB  # ids of inputs and targets, which all micro-batches of a step hold
    assert three.total == pytest.approx(two.total + tokens)
    assert one.total < two.total


def test_muon_keeps_half_of_the_state_of_adamw() -> None:
    adamw, muon = (predicted(CASES[0], optimizer=optimizer).parts["optimizer"] for optimizer in OPTIMIZERS.values())
    assert 0.5 < muon / adamw < 0.6


def test_a_value_is_held_as_long_as_somebody_holds_it() -> None:
    tape = Tape(1, 1)
    x = tape.new(100)
    y = tape.apply([x], 50, saves=[x], trains=10)
    del x
    assert tape.peak == 600
    tape.backward(y)
    del y
    assert tape.peak == 4 * (100 + 50 + 50 + 100 + 10)
    assert sum(storage.nbytes for storage in tape.gradients) == 40
