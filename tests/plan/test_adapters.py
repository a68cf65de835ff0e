"""What adapters cost, against those that are made and what torch's allocator counts while they are trained."""

from __future__ import annotations

from typing import Any

import pytest

import zoo
from benchmarks import meter
from benchmarks.own_memory import ADAMW
from zoo.adapt.lora import adapt, adapters_of
from zoo.decoder import build
from zoo.plan.adapters import adapter_size
from zoo.plan.own_memory import peak_memory
from zoo.spec.finetune import LoraFinetune

MODELS = [
    "qwen3_30b_a3b",
    "gpt_oss_20b",
    "deepseek_v3_2",
    "jamba_v0_1",
    "nemotron_3_super_120b_a12b",
    "kimi_linear_48b_a3b",
]


@pytest.mark.parametrize("targets", [["layers.*"], ["*.mixer.*"], ["layers.1.ffn.*"]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_counts_what_is_made(name: str, targets: list[str]) -> None:
    spec = zoo.load(name, "model_scale=tiny")
    lora = LoraFinetune(path="x", rank=3, targets=tuple(targets))
    model = build(spec, "meta")
    adapt(model, lora)
    assert adapter_size(spec, lora.targets, lora.rank).numel == sum(
        value.numel() for value in adapters_of(model).values()
    )


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize("name", ["llama3_1_70b", "qwen3_30b_a3b"])
def test_memory_is_predicted(monkeypatch: pytest.MonkeyPatch, name: str, recompute: str) -> None:
    spec, lora = zoo.load(name, "model_scale=tiny"), LoraFinetune(path="x", rank=2)

    def adapted(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        adapt(model, lora)
        return model

    monkeypatch.setattr(meter, "build", adapted)
    settings: dict[str, Any] = {"batch_size": 4, "seq_len": 256, "optimizer": ADAMW, "recompute": recompute}
    measured = meter.measure(spec, **settings)
    found = peak_memory(spec, **settings, adapters=adapter_size(spec, lora.targets, lora.rank))
    assert found.nbytes == pytest.approx(measured.peak, rel=0.2)
    assert found.nbytes > 0.95 * measured.peak
    assert found.parts["gradients"] < 0.2 * peak_memory(spec, **settings).by_phase["optimizer"]
