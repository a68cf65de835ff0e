"""The watch names 5 planted failures within 20 steps each, and says nothing in 10 healthy runs of 300 steps."""

from __future__ import annotations

import math
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Row
from zoo.config import compose
from zoo.spec.run import decode_run
from zoo.train import loop
from zoo.train.events import Alerted
from zoo.train.signals import StopSignal

BAR, HEALTHY_STEPS, PLANTED_AFTER = 20, 300, 100
TEXT = Path(sysconfig.get_paths()["stdlib"]) / "email"
SMALL = [
    "model.d_model=32",
    "data=files",
    f"data.paths='{TEXT}/*.py'",
    "hardware=cpu",
    "precision=fp32",
    "train.batch_size=4",
    "train.seq_len=32",
    "train.eval_every=null",
    "train.eval_tokens=32",
    "train.sample_tokens=0",
    "checkpoint.every=null",
]
MOE = ["model=tiny_moe", "model.layers='2*sparse'", "model.moe.d_expert=32"]
DENSE = ["model=tiny_dense", "model.layers='2*dense'"]
TWIN = ["model_scale=tiny", "model.vocab_size=256"]
HEALTHY: dict[str, list[str]] = {
    "experts, Muon": MOE,
    "experts, AdamW, constant rate 1e-2": [*MOE, "optimizer=adamw", "optimizer.lr=1e-2", "schedule=constant"],
    "experts, long warmup": [*MOE, "optimizer=adamw", "optimizer.lr=5e-3", "schedule.warmup=150", "train.seed=1"],
    "experts, sigmoid, moved by bias": [
        *MOE,
        "model/moe/router=sigmoid",
        "model.moe.balance={bias_update_rate: 0.01}",
        "train.seed=2",
    ],
    "experts, 64 tokens a step": [*MOE, "optimizer=adamw", "train.batch_size=2", "train.seed=3"],
    "experts, bf16, no clipping": [*MOE, "precision=bf16", "train.clip_norm=null", "train.seed=4"],
    "dense, Muon": [*DENSE, "train.seed=5"],
    "dense, AdamW, warmup-stable-decay": [*DENSE, "optimizer=adamw", "schedule=wsd", "train.seed=6"],
    "latent attention, groups of experts": ["model=deepseek_v3", *TWIN, "train.batch_size=2"],
    "state space, attention and experts": ["model=nemotron_3_nano_30b_a3b", *TWIN, "train.batch_size=2"],
}


def run_of(*overrides: str, steps: int) -> Any:
    """The settings of a small run."""
    return decode_run(compose([*SMALL, *overrides, f"train.steps={steps}"]))


class Ear:
    """A reporter that keeps alerts."""

    def __init__(self) -> None:
        self.alerts: list[Alerted] = []

    def alerted(self, event: Alerted) -> None:
        self.alerts.append(event)

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        return lambda event: None


def alerts_of(run: Any, folder: Path, plant: Callable[[loop.Session], None] | None = None) -> list[Alerted]:
    """Train; what was told. `plant` is called before each step after `PLANTED_AFTER`."""
    ear = Ear()
    session = loop.Session(run, folder, [ear])
    if plant is not None:
        take = session._train_step

        def step() -> Any:
            if session.step >= PLANTED_AFTER:
                plant(session)
            return take()

        session._train_step = step  # type: ignore[method-assign]
    with StopSignal() as stop:
        session.run_until(stop)
    return ear.alerts


def collapse_router(session: loop.Session) -> None:
    """Two experts of the last layer become a little more attractive with every step."""
    router: Any = list(session.parts.model.moe_layers().values())[-1].router
    with torch.no_grad():
        router.bias[:2] += 0.3


def raise_rate(session: loop.Session) -> None:
    """A hundred times the learning rate."""
    if session.step == PLANTED_AFTER:
        for optimizer in session.parts.optimizers:
            for group in optimizer.param_groups:
                group["peak_lr"] *= 100


class Poisoned:
    """Batches that are noise from one of them on."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self._batches.batch(step)
        if step < PLANTED_AFTER:
            return inputs, targets
        rows = torch.randint(256, (len(inputs), inputs.shape[1] + 1), generator=torch.Generator().manual_seed(step))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def poison(session: loop.Session) -> None:
    """A shard of noise."""
    if session.step == PLANTED_AFTER:
        session.batches = session.guard._batches = Poisoned(session.batches)


def break_gradient(session: loop.Session) -> None:
    """One gradient is no number, once."""
    if session.step == PLANTED_AFTER:
        weight = session.parts.model.layers[0].mixer.out.weight
        handle = weight.register_hook(lambda grad: (handle.remove(), grad * math.nan)[1])


def grow_residual(session: loop.Session) -> None:
    """What the first mixer writes grows by a quarter with every step."""
    with torch.no_grad():
        session.parts.model.layers[0].mixer.out.weight *= 1.25


PLANTED: dict[str, tuple[Callable[[loop.Session], None], list[str]]] = {
    "router_collapse": (collapse_router, [*MOE, "model.moe.router.logit_bias=true"]),
    "lr_blowup": (raise_rate, [*MOE, "optimizer=adamw", "schedule=constant"]),
    "bad_data": (poison, MOE),
    "nonfinite": (break_gradient, MOE),
    "residual_growth": (grow_residual, MOE),
}


def planted_alerts(name: str, folder: Path) -> list[Alerted]:
    """What is told of a run with the planted failure `name`, whose bar is 20 steps."""
    plant, overrides = PLANTED[name]
    return alerts_of(run_of(*overrides, steps=PLANTED_AFTER + BAR), folder, plant)


def rows() -> list[Row]:
    """Steps until the failure is named (ratio: the bar over that), and alerts in healthy runs."""
    torch.set_num_threads(1)
    loop.write_plots = lambda run_dir: []  # type: ignore[assignment]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in PLANTED:
            alerts = planted_alerts(name, Path(folder) / name)
            named = [alert.step - PLANTED_AFTER for alert in alerts if alert.name == name]
            steps = named[0] if named else math.inf
            also = ", ".join(sorted({alert.name for alert in alerts} - {name}))
            found.append(Row(name, f"named after {steps} steps", f"bar {BAR}", BAR / steps, also and f"also {also}"))
        for name, overrides in HEALTHY.items():
            alerts = alerts_of(run_of(*overrides, steps=HEALTHY_STEPS), Path(folder) / name.replace(" ", "_"))
            told = "; ".join(f"step {alert.step} {alert.name}: {alert.message}" for alert in alerts)
            what = f"healthy: {name}, {HEALTHY_STEPS} steps"
            found.append(Row(what, f"{len(alerts)} alerts", "bar 0", 1.0 / (1 + len(alerts)), told))
    return found
