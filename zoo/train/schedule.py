"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from zoo.spec.base import ConfigError
from zoo.spec.train import ConstantSpec, CosineSpec, ScheduleSpec, TrainSpec, WSDSpec, duration_in_steps


def lr_ratio(spec: ScheduleSpec, step: int, num_steps: int) -> float:
    """Factor on the peak learning rate for the update number `step` (from 0) of a run of `num_steps`."""
    warmup = duration_in_steps(spec.warmup, num_steps)
    if step < warmup:
        return (step + 1) / warmup
    return _AFTER_WARMUP[type(spec)](spec, step, warmup, num_steps)


def batch_sizes(train: TrainSpec, unit: int = 1) -> list[int]:
    """Sequences of each step while the batch grows, multiples of `unit`; after these it is `train.batch_size`.

    Raises:
        ConfigError: the unit is the whole batch, which leaves nothing to grow.
    """
    steps = duration_in_steps(train.batch_warmup, train.steps)
    if steps and unit >= train.batch_size > 1:
        rule = f"all processes take {unit} sequences together, the whole batch; give a smaller train.micro_batch"
        raise ConfigError(f"train.batch_warmup: found {train.batch_warmup}; {rule}")
    start = train.batch_start or max(1, train.batch_size // 8)
    grown = [start + (train.batch_size - start) * step / steps for step in range(steps)]
    return [min(train.batch_size, max(1, round(size / unit)) * unit) for size in grown]


def _cosine(spec: CosineSpec, step: int, warmup: int, num_steps: int) -> float:
    progress = (step - warmup) / max(1, num_steps - warmup)
    return spec.min_ratio + (1 - spec.min_ratio) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def _wsd(spec: WSDSpec, step: int, warmup: int, num_steps: int) -> float:
    decay = min(duration_in_steps(spec.decay, num_steps), num_steps - warmup)
    into_decay = step - (num_steps - decay)
    if into_decay < 0:
        return 1.0
    return 1 - (1 - spec.min_ratio) * min(into_decay / max(1, decay), 1.0)


def _constant(spec: ConstantSpec, step: int, warmup: int, num_steps: int) -> float:
    return 1.0


_AFTER_WARMUP: dict[type[ScheduleSpec], Callable[[Any, int, int, int], float]] = {
    CosineSpec: _cosine,
    WSDSpec: _wsd,
    ConstantSpec: _constant,
}
