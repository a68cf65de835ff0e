"""The public estimate: its fields, its errors, and published numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import zoo
from zoo.plan.engine import engine_names, engine_of
from zoo.plan.flops import count_flops
from zoo.spec.model import ModelSpec

LAYOUT = zoo.Layout(ep=8, dp=8)
SETTINGS = {"layout": LAYOUT, "seq_len": 4096, "global_batch": 512, "micro_batch": 4, "precision": "mxfp8"}


@pytest.fixture(scope="module")
def found() -> object:
    return zoo.estimate("qwen3_30b_a3b", "gb200_nvl72", **SETTINGS)


def test_parts_sum_to_the_whole(found) -> None:  # type: ignore[no-untyped-def]
    assert sum(found.time_s.values()) == pytest.approx(found.step_time_s)
    assert found.total_memory_gib == pytest.approx(sum(found.memory_gib.values()))
    assert {"weights", "gradients", "optimizer", "activations", "dispatch", "logits"} <= set(found.memory_gib)


def test_rates_follow_from_the_time(found) -> None:  # type: ignore[no-untyped-def]
    tokens = 512 * 4096
    assert found.tokens_per_s == pytest.approx(tokens / found.step_time_s)
    assert found.tokens_per_s_per_device == pytest.approx(tokens / found.step_time_s / 8)
    peak = 5000e12  # fp8, dense, of one GB200
    assert found.mfu == pytest.approx(found.flops.training * tokens / found.step_time_s / 8 / peak)
    assert 0 < found.mfu < 1
    assert found.fits


@pytest.mark.parametrize(  # GFLOP per token, forward and backward, causal half: throughput_notes.md, section 1
    ("model", "seq_len", "gflop"),
    [
        ("llama3_8b", 8192, 51.47),
        ("llama3_70b", 8192, 449.2),
        ("llama3_1_405b", 8192, 2524.0),
        ("deepseek_v3", 4096, 250.45),
        ("qwen3_235b_a22b", 4096, 148.33),
        ("qwen3_30b_a3b", 4096, 23.08),
        ("kimi_k2", 4096, 205.5),
    ],
)
def test_published_flops(load_model: Callable[[str], ModelSpec], model: str, seq_len: int, gflop: float) -> None:
    assert count_flops(load_model(model), seq_len).training / 1e9 == pytest.approx(gflop, rel=0.003)


def test_published_flops_with_multi_token_prediction() -> None:
    layout = zoo.Layout(pp=4, vp=4, ep=64, dp=64)
    found = zoo.estimate("deepseek_v3", "gb200_nvl72", layout=layout, global_batch=4096, precision="mxfp8")
    assert found.flops.training / 1e9 == pytest.approx(260.64, rel=0.003)  # this engine trains them
    bare = zoo.estimate("deepseek_v3", "gb200_nvl72", layout=layout, global_batch=4096, precision="mxfp8", mtp=False)
    assert bare.flops.training / 1e9 == pytest.approx(250.45, rel=0.003)
    assert bare.step_time_s < found.step_time_s


def test_descriptions_and_names_are_the_same(load_model: Callable[[str], ModelSpec]) -> None:
    named = zoo.estimate("tiny_moe", "h100_8x")
    described = zoo.estimate(load_model("tiny_moe"), "h100_8x")
    assert named == described


def test_overrides_are_those_of_the_command_line() -> None:
    small = zoo.estimate("llama3_8b", "h100_8x", "hardware.chip.memory_gib=20", recompute="none")
    assert not small.fits
    assert small.memory_limit_gib == 20
    fewer = zoo.estimate("qwen3_30b_a3b", "h100_8x", "model.moe.top_k=4")
    assert fewer.step_time_s < zoo.estimate("qwen3_30b_a3b", "h100_8x").step_time_s


def test_auto_recomputes_only_what_does_not_fit() -> None:
    layout = zoo.Layout(dp=64, shard=64)
    roomy = zoo.estimate("llama3_8b", "h100_8x", layout=layout, seq_len=2048)
    tight = zoo.estimate("llama3_8b", "h100_8x", layout=layout, seq_len=8192, micro_batch=8)
    assert (roomy.recompute, tight.recompute) == ("none", "full")


def test_engines_follow_the_machine() -> None:
    assert zoo.estimate("tiny_moe", "h100_8x").engine == f"megatron@{engine_of('megatron').epoch}"
    sharded = zoo.estimate("tiny_moe", "h100_8x", layout=zoo.Layout(dp=2, shard=2))
    assert sharded.engine.startswith("fsdp@")
    assert zoo.estimate("tiny_moe", "tpu_v5p").engine.startswith("maxtext@")
    assert zoo.estimate("tiny_moe", "h100_8x", engine="megatron@25.11").engine == "megatron@25.11"
    assert {name.partition("@")[0] for name in engine_names()} == {"megatron", "fsdp", "maxtext"}


def test_old_chips_run_what_was_published_on_them() -> None:
    assert zoo.estimate("llama3_8b", "a100_8x").engine == "megatron@2022"
    assert zoo.estimate("llama3_8b", "a100_8x", engine="megatron").engine == f"megatron@{engine_of('megatron').epoch}"
    assert zoo.estimate("llama3_8b", "mi300x_8x").engine == f"megatron@{engine_of('megatron').epoch}"  # none were


def test_the_error_follows_what_was_fitted() -> None:
    known = zoo.estimate("qwen3_30b_a3b", "h100_8x").error
    other = zoo.estimate("glm_4_5", "h100_8x").error
    elsewhere = zoo.estimate("qwen3_30b_a3b", "mi300x_8x").error
    assert known
    assert other
    assert elsewhere
    assert 0.01 < known.median < known.p90 < 1
    assert known.median < other.median
    assert [error.like.split()[-1] for error in (known, other, elsewhere)] == ["model", "family", "chip"]
    assert zoo.estimate("nemotron_3_nano_30b_a3b", "h100_8x").error.like.startswith("hybrid")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layout": zoo.Layout(tp=7)}, "tp 7 must divide"),
        ({"precision": "fp7"}, "precision: found 'fp7'"),
        ({"precision": "nvfp4"}, "hardware.chip.tflops.fp4"),
        ({"engine": "megatro"}, "did you mean megatron"),
        ({"engine": "megatron@1999"}, "engine: found 'megatron@1999'"),
        ({"optimizer": "adamx"}, "did you mean"),
        ({"recompute": "some"}, "recompute: found 'some'"),
        ({"routing": "uneven"}, "allowed: balanced, learned"),
        ({"graphs": "all"}, "allowed: none, layers, iteration"),
        ({"mtp": True}, "describes no multi-token prediction"),
        ({"seq_len": 0}, "seq_len: found 0"),
        ({"micro_batch": 3, "global_batch": 4}, "must divide global_batch 4"),
    ],
)
def test_mistakes_end_in_one_error(settings: dict[str, object], words: str) -> None:
    with pytest.raises(zoo.ConfigError) as caught:
        zoo.estimate("tiny_moe", "h100_8x", **settings)  # type: ignore[arg-type]
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("model", "hardware", "overrides", "words"),
    [
        ("tiny_mo", "h100_8x", (), "tiny_moe"),
        ("tiny_moe", "h100_9x", (), "h100_8x"),
        ("tiny_moe", "h100_8x", ("train.steps=3",), "an estimate knows overrides of model and hardware"),
        ("tiny_moe", "h100_8x", ("hardware.num_devices=7",), "hardware.num_devices 7"),
        ("tiny_moe", "arc_pro_b60", (), "hardware.chip"),
    ],
)
def test_unknown_names_and_overrides(model: str, hardware: str, overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(zoo.ConfigError) as caught:
        zoo.estimate(model, hardware, *overrides, precision="fp8")
    assert words in str(caught.value)
