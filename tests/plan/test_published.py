"""Layouts that others published are legal, fit, and are not quicker than the plan's own."""

from __future__ import annotations

import pytest

from benchmarks.planner_layouts import CONTRADICTORY, Judged, compared, judged, stated

RECENT = ("25.09", "25.11", "26.02", "26.04", "26.06")


@pytest.fixture(scope="module")
def recent() -> list[Judged]:
    """Of releases whose layouts were tuned for their tables, one run of each layout."""
    chosen = [run for run in stated() if run.epoch in RECENT]
    distinct = {
        (run.model, run.hardware, run.layout, run.micro_batch, run.precision, run.recompute): run for run in chosen
    }
    return [judged(run) for run in distinct.values()]


def test_published_layouts_are_legal_and_fit(recent: list[Judged]) -> None:
    assert len(recent) > 70
    assert [(one.run.row_id, one.problem) for one in recent if one.problem] == []
    assert [one.run.row_id for one in recent if one.priced is not None and not one.priced.fits] == []


def test_activations_on_the_host_are_what_makes_some_fit(recent: list[Judged]) -> None:
    moved = [one.priced for one in recent if one.run.recompute.startswith("offload")]
    assert len(moved) >= 2
    for priced in moved:
        assert priced is not None
        assert priced.time_s["offload"] < 0.1 * priced.step_time_s  # 225 GB/s to the host hide most of it


@pytest.mark.parametrize("model", ["DeepSeek-V3", "Llama3.1-405B", "Qwen3-235B-A22B"])
def test_plans_are_no_slower(recent: list[Judged], model: str) -> None:
    some = [one for one in recent if one.run.model == model and one.run.hardware == "gb200_nvl72"]
    ratios = [ratio for _, ratio in compared(some[:3])]
    assert ratios
    assert max(ratios) <= 1.05


def test_contradictions_are_known_rows() -> None:
    assert all(row.startswith("T") and why for row, why in CONTRADICTORY.items())
