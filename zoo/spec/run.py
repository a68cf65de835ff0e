"""A whole training run: everything that the composed configuration says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from zoo.spec.base import Spec, choice_of, decode, problem
from zoo.spec.composed import plain, take_model
from zoo.spec.data import DataSpec, TokenizerSpec
from zoo.spec.hardware import HardwareSpec, KernelsSpec, PrecisionSpec
from zoo.spec.model import ModelSpec
from zoo.spec.train import (
    CheckpointSpec,
    LoggerSpec,
    ManualParallelSpec,
    OptimizerSpec,
    ParallelSpec,
    ScheduleSpec,
    TrainSpec,
    WSDSpec,
    duration_in_steps,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig


class RunSpec(Spec):
    """What to train, on what, how and for how long."""

    model: ModelSpec
    hardware: HardwareSpec
    precision: PrecisionSpec
    kernels: KernelsSpec
    parallel: choice_of(ParallelSpec)  # type: ignore[valid-type]
    data: choice_of(DataSpec)  # type: ignore[valid-type]
    tokenizer: choice_of(TokenizerSpec)  # type: ignore[valid-type]
    optimizer: choice_of(OptimizerSpec)  # type: ignore[valid-type]
    schedule: choice_of(ScheduleSpec)  # type: ignore[valid-type]
    train: TrainSpec
    checkpoint: CheckpointSpec
    logger: choice_of(LoggerSpec)  # type: ignore[valid-type]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "model": self.model.to_dict()}

    @model_validator(mode="after")
    def _check(self) -> RunSpec:
        self._check_schedule()
        self._check_positions()
        self._check_devices()
        return self

    def _check_schedule(self) -> None:
        steps, schedule = self.train.steps, self.schedule
        taken = duration_in_steps(schedule.warmup, steps)
        decay = duration_in_steps(schedule.decay, steps) if isinstance(schedule, WSDSpec) else 0
        if taken + decay > steps:
            rule = f"warmup and decay take {taken + decay} steps, train.steps is {steps}"
            raise problem(("schedule", "warmup"), schedule.warmup, rule, "a fraction below 1 scales with the run")

    def _check_positions(self) -> None:
        positions = self.model.embedding.positions
        if positions is None:
            return
        for name in ("seq_len", "sample_tokens"):
            length = getattr(self.train, name)
            if length > positions:
                rule = f"must be at most {positions}, the learned positions of the model"
                raise problem(("train", name), length, rule, "or raise model.embedding.positions")

    def _check_devices(self) -> None:
        advice = "zoo trains on one device so far; `zoo plan` lays out larger machines"
        if isinstance(self.parallel, ManualParallelSpec):
            for name, degree in self.parallel.degrees.items():
                if degree != 1:
                    raise problem(("parallel", name), degree, "must be 1", advice)
        if self.hardware.num_devices != 1:
            rule = "must be 1 for training"
            raise problem(("hardware", "num_devices"), self.hardware.num_devices, rule, f"{advice}; use hardware=auto")


def decode_run(cfg: DictConfig, model_name: str | None = None) -> RunSpec:
    """Decode a composed configuration.

    Args:
        model_name: The chosen option of the group `model`, for a model whose files give no other name.

    Raises:
        ConfigError: one line for each mistake, with its dotted path.
    """
    model, settings = take_model(plain(cfg), model_name)
    return decode(RunSpec, {**settings, "model": model})
