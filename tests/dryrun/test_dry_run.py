"""Rehearsals: exact where layers stand for others, equal to the planner's counts, and refused with a reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo.cli import main
from zoo.dryrun.compose import compose
from zoo.dryrun.ledger import Ledger
from zoo.dryrun.run import DryRun, dry_run
from zoo.dryrun.step import Job, measure
from zoo.dryrun.windows import chosen, stand_ins
from zoo.plan.layout import Layout
from zoo.spec.model import ModelSpec
from zoo.spec.train import AdamWSpec

HYBRID = "2*(mamba moe) mamba attention 3*(moe mamba)"


def twin(name: str, layers: str) -> ModelSpec:
    return zoo.shrink(zoo.load(name)).replace(layers=layers)


def job_of(spec: ModelSpec, layout: Layout, **settings: Any) -> Job:
    common = {"seq_len": 32, "micro_batch": 1, "num_micro_batches": 1, "recompute": "none", "compute": "bf16"}
    return Job(spec, layout, fused=True, optimizer=AdamWSpec(lr=1e-3), **{**common, **settings})


def rehearsed(job: Job, kept: list[int]) -> Ledger:
    kinds = list(job.spec.layer_kinds)
    places = list(kept) if len(kept) == len(kinds) else stand_ins(kinds, kept)
    return compose(measure(job, [kinds[index] for index in kept]), places, job.num_micro_batches)


@pytest.mark.parametrize(
    "job",
    [
        job_of(twin("nemotron_3_nano_30b_a3b", HYBRID), Layout(dp=4, ep=2, shard=4), recompute="selective:act"),
        job_of(twin("llama3_8b", "7*dense"), Layout(tp=2, dp=4, shard=2), recompute="full", num_micro_batches=2),
    ],
    ids=["experts", "tensors"],
)
def test_layers_that_stand_for_others_are_exact(job: Job) -> None:
    number = len(job.spec.layer_kinds)
    kept = chosen(job.spec.layer_kinds)
    assert len(kept) < number
    some, whole = rehearsed(job, kept), rehearsed(job, list(range(number)))
    assert (some.peak, some.at_peak, some.where) == (whole.peak, whole.at_peak, whole.where)
    assert (some.flops, some.sent, some.calls) == (whole.flops, whole.sent, whole.calls)
    for phase in ("forward", "loss", "backward"):
        assert some.phase_peaks[phase] == whole.phase_peaks[phase]


@pytest.fixture(scope="module")
def moe() -> DryRun:
    layout = Layout(tp=2, dp=4, ep=4, shard=4)
    return dry_run("tiny_moe", "h100_8x", layout=layout, seq_len=64, global_batch=8, recompute="none")


def test_counts_are_the_planner_s(moe: DryRun) -> None:
    planned = moe.planned
    assert moe.flops["forward"] + moe.flops["backward"] == moe.planned_flops
    assert moe.traffic["ep"] == planned.traffic["ep"]
    for kind in (
        "tp",
        "shard",
    ):  # vectors, and a part of the embedding's table too few: nothing in a model of some size
        assert moe.traffic[kind] == pytest.approx(planned.traffic[kind], rel=0.02)
    assert sum(moe.traffic.values()) == pytest.approx(sum(planned.traffic.values()), rel=0.02)


def test_states_are_those_of_the_parameters(moe: DryRun) -> None:
    """Experts over ep and the processes with the same ones; all else over tp and shard, or shard where it is whole."""
    assert moe.memory_gib["optimizer"] == pytest.approx(moe.planned.memory_gib["optimizer"], rel=0.01)
    assert moe.peak_gib == pytest.approx(sum(moe.memory_gib.values()))
    assert moe.phase_gib["forward"] <= moe.peak_gib


def test_a_crowded_process_holds_more(moe: DryRun) -> None:
    planned = moe.planned
    crowded = dry_run(
        "tiny_moe", "h100_8x", layout=planned.layout, seq_len=64, global_batch=8, recompute="none", skew=2.0
    )
    assert crowded.memory_gib["dispatch"] > 1.5 * moe.memory_gib["dispatch"]
    assert crowded.memory_gib["weights"] == moe.memory_gib["weights"]


def test_the_first_stage_holds_the_micro_batches_in_flight() -> None:
    job = job_of(twin("llama3_8b", "4*dense"), Layout(pp=2, dp=2), num_micro_batches=4)
    kinds = ["dense", "dense"]
    measured = measure(job, kinds)
    one, two = (compose(measured, [0, 1], 4, flight) for flight in (1, 2))
    forward = sum(measured.steps[f"forward.1.{layer}"].total for layer in (0, 1))
    assert two.phase_peaks["forward"] - one.phase_peaks["forward"] == pytest.approx(forward, rel=0.3)
    last = measure(replace(job, stage=1), kinds)
    assert sum(last.base.values()) > sum(measured.base.values())  # a norm more


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny_moe", "h100_8x", "hardware.num_devices=7", "tp=4"], "tp: found 4; must divide the 7 devices"),
        (["tiny_moe", "h100_8x", "parallel='tp3'"], "parallel: found"),
        (["tiny_moe", "h100_8x", "parallel=tp3"], "tp: found 3; must divide the 8 devices"),
        (["tiny_moe", "h100_8x", "parallel=manual", "tp=3"], "tp: found 3; must divide the 8 devices"),
        (["tiny_moe", "h100_8x", "parallel=tp2", "tp=2"], "leave one out"),
        (["tiny_moe", "h100_8x", "precision=fp8"], "precision: found 'fp8'; a rehearsal computes in bf16 or fp32"),
        (["tiny_moe", "h100_8x", "recompute=selective:moe"], "recompute: found 'selective:moe'"),
        (["tiny_moe", "h100_8x", "optimizer=muon"], "optimizer: found 'muon'"),
        (["tiny_moe", "h100_8x", "skew=much"], "skew: found 'much'; must be a number"),
        (["tiny_moe", "h100_8x", "skew=0"], "skew: found 0.0; must be above 0"),
        (["tiny_moe", "h100_8x", "stage=1", "parallel=dp8"], "stage: found 1; must be one of the 1 stages"),
        (["tiny_moe", "h100_8x", "tokens=1e9"], "tokens: found"),
        (["tiny_moe", "h100_8x", "json=/nowhere/run.json"], "json: found"),
        (["nemotron_3_ultra_550b_a55b", "h100_8x"], "fit"),
    ],
)
def test_a_wrong_question_has_one_clear_answer(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dryrun", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_the_command_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    words = ["tiny_dense", "h100_8x", "hardware.num_devices=2", "parallel=dp2", "seq_len=32", "global_batch=2"]
    assert main(["dryrun", *words, f"json={path}"]) == 0
    shown, written = capsys.readouterr().out, json.loads(path.read_text(encoding="utf-8"))
    assert "Memory at the peak" in shown
    assert f"written: {path}" in shown
    assert written["layout"]["dp"] == 2
    assert written["peak_gib"] == pytest.approx(sum(written["memory_gib"].values()))
    assert written["flops"]["forward"] + written["flops"]["backward"] == written["planned"]["flops"]
