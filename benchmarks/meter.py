"""The memory that a training step really holds, by the counters of torch's allocator.

torch's profiler records every allocation and every release on the CPU with its exact size, those inside of operators
included, where a mode that watches dispatched operations sees their results alone. What kernels take past the allocator
(packing buffers of the matrix library) is not in it, and is no part of what a model's shapes imply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from zoo.decoder import Decoder, build
from zoo.native.library import library
from zoo.spec import ModelSpec
from zoo.spec.train import OptimizerSpec
from zoo.train.optim import build_optimizers
from zoo.train.trainer import Autocast, RoutingCounter, accumulate, clip_gradients

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BEGINS = {"aten::embedding": "forward", "zoo::clip": "clip", "zoo::optimizer": "optimizer"}
"""The first event of a phase; the backward pass begins with the first function that autograd evaluates."""


@dataclass(frozen=True)
class Measured:
    """Bytes that a training step holds."""

    by_phase: dict[str, int]
    """The peak of each phase."""
    before: int
    """Before the step: weights, buffers and optimizer state."""

    @property
    def phase(self) -> str:
        """The phase of the peak."""
        return max(self.by_phase, key=self.by_phase.__getitem__)

    @property
    def peak(self) -> int:
        """Of the whole step."""
        return max(self.by_phase.values())


class Trained:
    """A model in training, one optimizer step done: the optimizer has its state."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        batch_size: int,
        seq_len: int,
        optimizer: OptimizerSpec,
        recompute: str = "none",
        weights: str = "fp32",
        compute: str = "fp32",
        grad_accumulation: int = 1,
    ) -> None:
        torch.manual_seed(0)
        self.model: Decoder = build(spec, dtype=DTYPES[weights])
        self.model.recompute = recompute  # type: ignore[assignment]
        self.optimizers = build_optimizers(self.model, optimizer)
        self.counter = RoutingCounter(self.model.moe_layers())
        self.batch_size = batch_size
        self.shape = (batch_size * grad_accumulation, seq_len + 1)
        self.autocast: Autocast = nullcontext
        if compute != weights:
            self.autocast = lambda: torch.autocast("cpu", DTYPES[compute])
        self.step()

    def step(self) -> None:
        """As `zoo.train.loop.Trainer` takes one."""
        rows = torch.randint(self.model.spec.vocab_size, self.shape)
        batch = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        del rows
        accumulate(self.model, batch, self.batch_size, self.autocast)
        with record_function("zoo::clip"):
            clip_gradients(self.model.parameters(), 1.0)
        with record_function("zoo::optimizer"):
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        self.counter.step_done()

    def held(self) -> int:
        """Bytes that are held between steps."""
        return held_bytes(self.model, self.optimizers, self.counter._totals.values())


def held_bytes(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], more: Iterable[Tensor] = ()) -> int:
    """Of weights, buffers and the state of optimizers; what is shared counts once."""
    states = (state for optimizer in optimizers for state in optimizer.state.values())
    counted = [*model.parameters(), *model.buffers(), *more]
    counted += [part for state in states for part in state.values() if isinstance(part, Tensor)]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in counted}
    return sum(storages.values())


def measure(spec: ModelSpec, **settings: Any) -> Measured:
    """The peak of the second step of training `spec`; settings as of `Trained`."""
    library()  # as `zoo train` does, if there is a compiler
    trained = Trained(spec, **settings)
    return peaks_of(trained.step, trained.held())


def peaks_of(step: Callable[[], object], before: int) -> Measured:
    """The peaks of a step that begins with `before` bytes."""
    live, phase, peaks = 0, "", dict[str, int]()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    for name, change in _in_order(profiler.profiler.kineto_results.events()):  # type: ignore[union-attr]
        phase = name or phase
        live += change
        peaks[phase] = max(peaks.get(phase, 0), before + live)
    return Measured(peaks, before)


def _in_order(events: Iterable[Any]) -> Iterator[tuple[str, int]]:
    """The name of a phase that begins, or an empty one and bytes that are taken or given back."""
    for event in sorted(events, key=lambda event: event.start_ns()):
        name = event.name()
        if name == "[memory]":
            yield "", event.nbytes()
        elif name in _BEGINS:
            yield _BEGINS[name], 0
        elif name.startswith("autograd::engine::evaluate_function"):
            yield "backward", 0
