"""A whole training run: everything that the composed configuration says."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from zoo.spec.base import Spec, choice_of, decode, problem
from zoo.spec.composed import plain, start_of, take_model
from zoo.spec.data import CheckpointTokenizer, DataSpec, TokenizerSpec
from zoo.spec.finetune import FinetuneSpec, FromCheckpoint, LoraFinetune, NoFinetune
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
    finetune: choice_of(FinetuneSpec) = NoFinetune()  # type: ignore[valid-type]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "model": self.model.to_dict()}

    @model_validator(mode="after")
    def _check(self) -> RunSpec:
        self._check_schedule()
        self._check_positions()
        self._check_start()
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

    def _check_start(self) -> None:
        if isinstance(self.tokenizer, CheckpointTokenizer):
            advice = "choose finetune=full or finetune=lora, or another tokenizer"
            raise problem(("tokenizer", "type"), self.tokenizer.type, "must have a checkpoint to come from", advice)
        if not isinstance(self.finetune, LoraFinetune):
            return
        degrees = self.parallel.degrees if isinstance(self.parallel, ManualParallelSpec) else {}
        if self.hardware.num_devices != 1 or any(degree != 1 for degree in degrees.values()):
            rule, advice = "trains on one device", "use finetune=full on several"
            raise problem(("finetune", "type"), self.finetune.type, rule, advice)


def decode_run(cfg: DictConfig, model_name: str | None = None) -> RunSpec:
    """Decode a composed configuration.

    Args:
        model_name: The chosen option of the group `model`, for a model whose files give no other name.

    Raises:
        ConfigError: one line for each mistake, with its dotted path.
    """
    data = plain(cfg)
    model, settings = take_model(data, model_name)
    start = start_of(data)
    if start is not None:
        settings |= _resolved(start, settings)
    return decode(RunSpec, {**settings, "model": model})


def _resolved(start: FromCheckpoint, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that refer to the checkpoint, in words that hold on their own and in any working directory."""
    path = str(Path(start.path).expanduser().absolute())
    found: dict[str, Any] = {"finetune": {**start.to_dict(), "path": path}}
    tokenizer = settings.get("tokenizer")
    if isinstance(tokenizer, Mapping) and tokenizer.get("type") == "checkpoint":
        separator = decode(CheckpointTokenizer, tokenizer, "tokenizer").separator
        # To open a checkpoint is the work of a higher floor, asked for only here.
        found["tokenizer"] = importlib.import_module("zoo.adapt.origin").tokenizer_of(path, separator)
    return found
