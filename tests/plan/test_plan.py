"""The public plan: a call that is a package, its explanations, and its refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from zoo.plan.explain import GROUPS, grouped, losses
from zoo.plan.plan import Plan
from zoo.plan.question import default_batch, precision_of, tokens_of_step

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made() -> Plan:
    return zoo.plan("qwen3_30b_a3b", "h100_8x", "hardware.num_devices=64", seq_len=4096, global_batch=1024)


LIGHT = """
import json, sys
import zoo
before = sorted({"numpy", "torch", "hydra"} & set(sys.modules))
from zoo.plan.layout import Layout
first = zoo.plan.params.__name__, callable(zoo.plan)
plan = zoo.plan("qwen3_0_6b", "h100_8x")
same = zoo.plan is sys.modules["zoo.plan"]
print(json.dumps([before, first, same, zoo.plan.params.__name__, "torch" in sys.modules]))
"""


@pytest.mark.parametrize("start", ["", "import zoo.plan.flops\n"])
def test_call_and_package_live_together(start: str) -> None:
    before, first, same, name, torch = json.loads(
        subprocess.check_output([sys.executable, "-c", start + LIGHT], cwd=ROOT, text=True)
    )
    assert before == ([] if not start else before)
    assert first == ["zoo.plan.params", True]
    assert (same, name, torch) == (True, "zoo.plan.params", False)


def test_package_has_nothing_else() -> None:
    assert not hasattr(zoo.plan, "something_else")
    assert not hasattr(zoo.plan, "_private")


def test_plan_is_its_own_best_estimate(made: Plan) -> None:
    assert made.layout.num_devices == 64
    assert made.best.fits
    assert (made.step_time_s, made.mfu) == (made.best.step_time_s, made.best.mfu)
    top = made.top(5)
    assert top[0] == made.best
    assert [one.step_time_s for one in top] == sorted(one.step_time_s for one in top)


def test_runner_up_has_other_degrees(made: Plan) -> None:
    assert made.runner_up is not None
    assert made.runner_up.step_time_s >= made.step_time_s
    assert made.runner_up.fits
    same = [
        name
        for name in ("tp", "pp", "cp", "ep", "etp", "dp", "shard")
        if getattr(made.layout, name) == getattr(made.runner_up.layout, name)
    ]
    assert len(same) < 7


def test_explanation_adds_up(made: Plan) -> None:
    assert made.runner_up is not None
    parts = grouped(made.best.time_s)
    assert sum(parts.values()) == pytest.approx(made.step_time_s)
    gaps = dict(losses(made.best, made.runner_up))
    assert sum(gaps.values()) == pytest.approx(made.runner_up.step_time_s - made.step_time_s)
    first, second, *_ = made.reasons
    largest = max(parts, key=lambda name: parts[name])
    assert first.startswith(f"the step is spent on {largest} {parts[largest] / made.step_time_s:.0%}")
    assert str(made.runner_up.layout) in second


def test_every_part_of_a_step_has_a_group(made: Plan) -> None:
    known = {part for parts in GROUPS.values() for part in parts}
    assert set(made.best.time_s) <= known


def test_limits_are_where_the_plan_ends(made: Plan) -> None:
    assert [limit.factor for limit in made.limits] == sorted(limit.factor for limit in made.limits)
    (limit,) = (limit for limit in made.limits if limit.what.startswith("sequences"))
    for factor, fits in ((limit.factor, True), (2 * limit.factor, False)):
        longer = zoo.estimate(
            "qwen3_30b_a3b",
            "h100_8x",
            layout=made.layout,
            seq_len=int(4096 * factor),
            global_batch=1024,
            micro_batch=made.micro_batch,
            recompute=made.recompute,
        )
        assert longer.fits == fits


def test_memory_in_the_way_is_named() -> None:
    small = zoo.plan("qwen3_30b_a3b", "h100_8x", "hardware.num_devices=64", "hardware.chip.memory_gib=60")
    large = zoo.plan("qwen3_30b_a3b", "h100_8x", "hardware.num_devices=64", "hardware.chip.memory_gib=600")
    assert large.step_time_s < 0.95 * small.step_time_s
    assert "memory stands in the way of" in " ".join(small.reasons)
    assert "memory stands in the way of" not in " ".join(large.reasons)


def test_why_not(made: Plan) -> None:
    layout = zoo.Layout
    assert "there are 64 devices" in made.why_not(layout(tp=8))
    assert "tp 64 must divide the 32 heads" in made.why_not(layout(tp=64))
    assert "ep 64 must divide" not in made.why_not(layout(ep=64, dp=64))
    assert "does not fit: it needs" in made.why_not(layout(dp=64))
    assert "it was chosen" in made.why_not(made.layout, micro_batch=made.micro_batch, recompute=made.recompute)
    slow = made.why_not(layout(tp=8, dp=8, ep=8), micro_batch=1)
    later = zoo.plan(
        "qwen3_30b_a3b",
        "h100_8x",
        "hardware.num_devices=64",
        global_batch=1024,
        tp=8,
        dp=8,
        ep=8,
        pp=1,
        cp=1,
        etp=1,
        shard=1,
        vp=1,
        micro_batch=1,
    )
    assert f"takes {later.step_time_s / made.step_time_s - 1:.1%} longer" in slow


def test_precisions_are_chosen_among() -> None:
    both = zoo.plan("llama3_8b", "h100_8x", precision=["bf16", "fp8"])
    one = {name: zoo.plan("llama3_8b", "h100_8x", precision=name) for name in ("bf16", "fp8")}
    assert both.precision == min(one, key=lambda name: one[name].step_time_s)
    assert both.step_time_s == min(plan.step_time_s for plan in one.values())


def test_descriptions_do_as_well_as_names() -> None:
    spec, machine = zoo.load("llama3_8b"), zoo.plan.estimate.load_hardware("h100_8x")
    assert zoo.plan(spec, machine).best == zoo.plan("llama3_8b", "h100_8x").best
    with pytest.raises(zoo.ConfigError, match="the hardware is given as a description"):
        zoo.plan(spec, machine, "hardware.num_devices=16")


def test_reserve_leaves_memory_free() -> None:
    made = zoo.plan("llama3_8b", "h100_8x", reserve=0.3)
    assert made.best.total_memory_gib <= 0.7 * 80


def test_machine_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    import zoo.hardware

    monkeypatch.setattr(zoo.hardware, "measure", lambda chip: zoo.hardware.Speed({"fp32": 0.2, "bf16": 0.5}, 20.0))
    made = zoo.plan("tiny_moe", "cpu", seq_len=256, global_batch=16)
    assert made.layout == zoo.Layout()
    assert made.precision == "bf16"
    assert made.best.memory_limit_gib
    assert made.question.machine.chip.tflops.fp32 == 0.2


def test_defaults_follow_the_model_and_the_machine() -> None:
    made = zoo.plan("llama3_8b", "h100_8x")
    assert made.best.seq_len == 4096
    assert made.best.global_batch == default_batch(zoo.load("llama3_8b"), 8, 4096)
    tokens = made.best.global_batch * 4096
    assert 0.7 < tokens / tokens_of_step(zoo.load("llama3_8b")) < 1.5
    assert default_batch(zoo.load("llama3_8b"), 72, 4096) % 72 == 0
    machine = zoo.plan.estimate.load_hardware("h100_8x")
    assert (precision_of(machine, "auto"), precision_of(machine, "fp32")) == ("bf16", "fp32")


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        (("tiny_moe", "h100x"), {}, "hardware: found 'h100x'; did you mean h100_8x"),
        (("tiny_mo", "h100_8x"), {}, "model: found 'tiny_mo'; did you mean tiny_moe"),
        (("tiny_moe", "h100_8x", "hardware.num_devices=7"), {"tp": 4}, "tp: found 4; must divide the 7 devices"),
        (("tiny_moe", "h100_8x"), {"precision": "fp9"}, "precision: found 'fp9'"),
        (("tiny_moe", "h100_8x"), {"recompute": "all"}, "recompute: found 'all'"),
        (("tiny_moe", "h100_8x"), {"engine": "x"}, "engine: found 'x'"),
        (("tiny_moe", "h100_8x"), {"seq_len": 0}, "seq_len: found 0; must be a positive integer"),
        (("tiny_moe", "h100_8x"), {"reserve": 1.0}, "reserve: found 1.0"),
        (("tiny_moe", "h100_8x", "hardware.num_devices=7"), {"global_batch": 100}, "global_batch=98 would do"),
        (("llama3_8b", "h100_8x"), {"tp": 2, "pp": 8}, "tp \\* pp \\* cp \\* dp: found 16; must divide the 8 devices"),
        (("qwen3_8b", "m4_max"), {"precision": "fp8"}, "hardware.chip.tflops.fp8"),
        (("llama3_8b", "h100_8x"), {"ep": 2}, "layout: ep 2 needs experts; the model has none"),
        (("llama3_8b", "a100_8x", "hardware.num_devices=64"), {"tp": 64}, "layout: tp 64 must divide the 32 heads"),
        (("llama3_8b", "h100_8x"), {"micro_batch": 3, "global_batch": 64, "dp": 8}, "micro_batch . dp, 3 . 8, must"),
        (("llama3_8b", "h100_8x"), {"recompute": "offload:x"}, "a number of layers, such as offload:20"),
    ],
)
def test_impossible_questions(asked: tuple[str, ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(zoo.ConfigError, match=message) as error:
        zoo.plan(*asked, **options)
    assert len(str(error.value).splitlines()) == 1


def test_model_that_fits_nowhere() -> None:
    with pytest.raises(zoo.ConfigError, match="llama3_8b fits in no layout of rtx4090") as error:
        zoo.plan("llama3_8b", "rtx4090")
    message = str(error.value)
    assert len(message.splitlines()) == 1
    needed = float(message.split("needs ")[1].split(" GiB")[0])
    assert f"{needed - 0.96 * 24:.3g} more than the 23.04 that a plan may take (all but reserve=0.04)" in message
    enough = int(message.split("hardware.num_devices=")[1].split(" ")[0])
    assert zoo.plan("llama3_8b", "rtx4090", f"hardware.num_devices={enough}").best.fits
    with pytest.raises(zoo.ConfigError):
        zoo.plan("llama3_8b", "rtx4090", f"hardware.num_devices={enough // 2}", global_batch=enough // 2)
