"""The time of a step of zoo's own training on this processor is predicted: median error at most 15%.

The machine is measured in turns with the models, because its speed drifts from minute to minute; both are medians over
all turns. The overheads and kinds of operations were settled on other models than these (`FITTED_ON`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

import zoo
from benchmarks.harness import Row
from zoo.decoder import build
from zoo.hardware.rates import measure_rates
from zoo.plan.local import Rates, StepOps, step_seconds
from zoo.spec.model import ModelSpec
from zoo.spec.train import AdamWSpec, MuonSpec, OptimizerSpec
from zoo.train.optim import build_optimizers
from zoo.train.trace import step_ops
from zoo.train.trainer import accumulate, clip_gradients

ADAMW = AdamWSpec(lr=1e-4)
MUON = MuonSpec(lr=1e-4, adamw=ADAMW)
MEDIUM = ("model.d_model=512", "model.mlp.d_ffn=1536", "model.vocab_size=16384", "model.layers='6*dense'")
CASES: tuple[tuple[str, tuple[str, ...], int, int, str], ...] = (
    ("tiny_dense", (), 8, 256, "adamw"),
    ("tiny_dense", MEDIUM, 2, 256, "adamw"),
    ("tiny_moe", (), 16, 256, "muon"),
    ("tiny_moe", ("model.moe.num_experts=16",), 2, 64, "adamw"),
    ("tiny_moe", ("model.d_model=320", "model.moe.d_expert=320"), 4, 512, "adamw"),
    ("~olmoe_1b_7b", (), 8, 128, "adamw"),
    ("~deepseek_v3", (), 4, 256, "adamw"),
    ("~gemma3_1b", (), 2, 512, "adamw"),
    ("~nemotron_3_nano_30b_a3b", (), 2, 256, "adamw"),
    ("~qwen3_next_80b_a3b", (), 2, 256, "adamw"),
    ("~jamba_v0_1", (), 2, 64, "adamw"),
    ("~mimo_v2_flash", (), 8, 256, "muon"),
)
"""Model (`~`: its twin), changes, sequences, tokens, optimizer."""
FITTED_ON = (
    "other sizes of tiny_moe and tiny_dense, and the twins of deepseek_v2_lite, nemotron_h_8b, qwen3_5_9b, gemma2_2b, "
    "mixtral_8x7b, granite4_h_small, kimi_linear_48b_a3b"
)
TURNS, TURN_S = 3, 0.5


def rows() -> list[Row]:
    made = [(case, *prepared(case)) for case in CASES]
    seconds: list[list[float]] = [[] for _ in CASES]
    rates = []
    for _ in range(TURNS):
        for index, (_, _, step) in enumerate(made):
            step()
            deadline = time.perf_counter() + TURN_S
            while time.perf_counter() < deadline or not seconds[index]:
                seconds[index].append(step())
        rates.append(asdict(measure_rates()))
    machine = Rates(**_middle(*rates))
    found, errors = [], []
    for (case, ops, _), times in zip(made, seconds, strict=True):
        measured, predicted = statistics.median(times), sum(step_seconds(ops, machine).values())
        errors.append(abs(predicted / measured - 1))
        model, changes, batch, seq_len, optimizer = case
        what = (
            f"{model.replace('~', 'twin of ')}{' changed' if changes else ''}, {batch} x {seq_len} tokens, {optimizer}"
        )
        found.append(Row(what, f"{1e3 * predicted:.3g} ms", f"measured {1e3 * measured:.3g} ms", predicted / measured))
    median = statistics.median(errors)
    return [
        *found,
        Row("median error of these", f"{median:.1%}", "limit 15%", 0.15 / median, f"settled on {FITTED_ON}"),
    ]


def prepared(case: tuple[str, tuple[str, ...], int, int, str]) -> tuple[StepOps, Callable[[], float]]:
    """What a step does, and a call that does it and says how long it took."""
    name, changes, batch, seq_len, optimizer = case
    spec = zoo.shrink(zoo.load(name[1:])) if name.startswith("~") else zoo.load(name, *changes)
    rule = MUON if optimizer == "muon" else ADAMW
    return step_ops(spec, batch, seq_len, rule), stepper(spec, batch, seq_len, rule)


def stepper(spec: ModelSpec, batch: int, seq_len: int, rule: OptimizerSpec) -> Callable[[], float]:
    """A step as the training loop takes it, on random tokens."""
    model = build(spec)
    optimizers = build_optimizers(model, rule)
    tokens = torch.randint(0, spec.vocab_size, (batch, seq_len + 1))
    pair = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        start = time.perf_counter()
        accumulate(model, pair, batch, nullcontext)
        clip_gradients(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def _middle(*values: Any) -> Any:
    """The median of numbers, place by place, in dictionaries and lists of equal shape."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _middle(*(value[key] for value in values)) for key in first}
    if isinstance(first, (list, tuple)):
        return [_middle(*column) for column in zip(*values, strict=True)]
    return statistics.median(values)
