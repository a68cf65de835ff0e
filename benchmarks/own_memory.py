"""The planner's peak memory of zoo's own training on a CPU is what torch's allocator counts, within 5%."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import zoo
from benchmarks.harness import Row
from benchmarks.meter import Measured, measure
from zoo.plan.own_memory import PeakMemory, peak_memory
from zoo.spec import ModelSpec
from zoo.spec.train import AdamWSpec, MuonSpec, OptimizerSpec

ADAMW = AdamWSpec(lr=1e-3)
OPTIMIZERS: dict[str, OptimizerSpec] = {"adamw": ADAMW, "muon": MuonSpec(lr=1e-3, adamw=ADAMW)}
MIB = 2.0**20
BAR = 0.05


@cache
def _load(name: str, overrides: tuple[str, ...]) -> ModelSpec:
    return zoo.load(name, *overrides)


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    model: str
    overrides: tuple[str, ...] = ("model_scale=tiny",)
    """Of the model; a released one is measured as its tiny twin."""
    batch_size: int = 4
    seq_len: int = 128
    optimizer: str = "adamw"
    rest: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `peak_memory`."""
    what: str = ""
    """What the case is for."""

    def spec(self) -> ModelSpec:
        return _load(self.model, self.overrides)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `peak_memory` and of `measure` beside the model."""
        optimizer = OPTIMIZERS[self.optimizer]
        return {"batch_size": self.batch_size, "seq_len": self.seq_len, "optimizer": optimizer, **self.rest}

    def __str__(self) -> str:
        options = ", ".join(f"{name} {value}" for name, value in self.rest.items())
        sizes = f"{self.batch_size} x {self.seq_len} tokens, {self.optimizer}"
        return f"{self.model} ({self.what}), {sizes}{options and ', '}{options}"


AGAIN = {"recompute": "layer"}
CASES = (
    Case("tiny_dense", (), 2, 64, "muon", what="grouped queries"),
    Case("llama3_1_70b", batch_size=8, seq_len=256, rest=AGAIN, what="grouped queries"),
    Case("gemma3_27b", what="sliding windows, norms on both sides"),
    Case("gemma2_2b", batch_size=2, seq_len=256, rest=AGAIN, what="soft caps"),
    Case("gpt2_large", rest={"grad_accumulation": 2}, what="layer norms, learned positions, tied"),
    Case("qwen3_30b_a3b", batch_size=8, what="softmax router"),
    Case("tiny_moe", (), 1, 256, "muon", AGAIN, what="balance losses"),
    Case("gpt_oss_120b", what="sinks, biased experts"),
    Case("glm_4_5_air", optimizer="muon", rest={"grad_accumulation": 3}, what="sigmoid router, a shared expert"),
    Case("tiny_dense", ("model.vocab_size=16384",), 2, 512, what="a large vocabulary, logits in chunks"),
    Case("grok_1", batch_size=1, seq_len=64, rest=AGAIN, what="more weights than tokens"),
    Case("deepseek_v3", ("model_scale=tiny", "model.mtp.enabled=true"), what="MLA, multi-token prediction"),
    Case("kimi_k2", optimizer="muon", seq_len=192, rest=AGAIN, what="MLA, shared experts"),
    Case("deepseek_v3_2", batch_size=2, what="MLA, chosen keys"),
    Case("nemotron_3_super_120b_a12b", rest=AGAIN, what="Mamba-2, latent experts, squared relu"),
    Case("granite4_h_small", seq_len=200, what="Mamba-2"),
    Case("jamba_v0_1", batch_size=2, what="Mamba-1"),
    Case("qwen3_next_80b_a3b", rest=AGAIN, what="gated delta rule"),
    Case("kimi_linear_48b_a3b", what="delta rule with channel decays, MLA"),
    Case("lfm2_8b_a1b", batch_size=8, seq_len=96, optimizer="muon", what="short convolutions"),
)
LARGER = Case(
    "tiny_moe",
    ("model.d_model=384", "model.moe.num_experts=16", "model.moe.d_expert=512", "model.layers=5*sparse"),
    seq_len=256,
    what="48M parameters",
)


def compare(case: Case) -> tuple[Measured, PeakMemory, float]:
    """What is measured, what is predicted, and the relative error of the prediction."""
    spec = case.spec()
    measured, predicted = measure(spec, **case.settings), peak_memory(spec, **case.settings)
    return measured, predicted, predicted.nbytes / measured.peak - 1


def rows() -> list[Row]:
    found, errors = [], []
    for case in (*CASES, LARGER):
        measured, predicted, error = compare(case)
        errors.append(abs(error))
        ours = f"{predicted.nbytes / MIB:.2f} MiB, {predicted.phase}"
        found.append(
            Row(
                str(case),
                ours,
                f"{measured.peak / MIB:.2f} MiB, {measured.phase}",
                BAR / max(abs(error), 1e-4),
                f"{error:+.2%}",
            )
        )
    return [Row("largest error", f"{max(errors):.2%}", f"bar {BAR:.0%}", BAR / max(errors)), *found]
