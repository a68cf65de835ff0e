"""How a run trains: optimizer, learning-rate schedule, steps, checkpoints, logger, parallelism."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_core import PydanticCustomError

from zoo.spec.base import Items, Spec, TypedSpec, problem, register_spec
from zoo.spec.watch import WatchSpec

Fraction = Annotated[float, Field(ge=0, lt=1)]


class RuleSpec(Spec):
    """Other settings for some of the parameters."""

    match: str
    """Pattern of their names, as `*.router.*`; of several rules that match, all hold, the last one last."""
    lr_scale: NonNegativeFloat = 1.0
    """Factor on the learning rate."""
    weight_decay: NonNegativeFloat | None = None
    """Absent: as without the rule."""


class OptimizerSpec(TypedSpec):
    """A rule that turns gradients into updates. `lr` is the peak that the schedule scales."""

    lr: PositiveFloat
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled: weights shrink by lr * weight_decay at each step."""
    rules: Items[RuleSpec] = ()
    """Other rates and decays by the names of parameters."""


@register_spec
class AdamWSpec(OptimizerSpec):
    """AdamW (arXiv:1711.05101), fused where the device has it."""

    type: Literal["adamw"] = "adamw"
    betas: Items[Fraction] = (0.9, 0.95)
    """Decay rates of the first and the second moment."""
    eps: PositiveFloat = 1e-8
    decay: Literal["matrices", "all"] = "matrices"
    """What weight decay shrinks. `matrices` spares norms, biases and the embedding tables."""

    @model_validator(mode="after")
    def _check(self) -> AdamWSpec:
        if len(self.betas) != 2:
            raise problem("betas", self.betas, "must be two numbers")
        return self


@register_spec
class MuonSpec(OptimizerSpec):
    """Muon on matrices and experts, AdamW on embeddings, head, routers, norms and biases.

    Momentum is orthogonalised by Newton-Schulz iterations, matrix by matrix, and scaled by
    0.2 * sqrt(max(rows, columns)) so that its RMS matches AdamW's (arXiv:2502.16982): learning rates carry over.
    """

    type: Literal["muon"] = "muon"
    momentum: Fraction = 0.95
    nesterov: bool = True
    ns_steps: PositiveInt = 5
    adamw: AdamWSpec
    """For every parameter that is not a matrix inside a layer."""

    @model_validator(mode="after")
    def _check(self) -> MuonSpec:
        if self.adamw.rules:
            raise problem(("adamw", "rules"), len(self.adamw.rules), "one list holds for all", "write optimizer.rules")
        return self


def _check_duration(value: Any) -> Any:
    steps = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    fraction = isinstance(value, float) and 0 <= value < 1
    if not steps and not fraction:
        raise PydanticCustomError("duration", "must be a whole number of steps, or a fraction of the run below 1")
    return value


Duration = Annotated[int | float, BeforeValidator(_check_duration)]
"""Whole number: steps. Fraction below 1: that part of the run."""


def duration_in_steps(duration: int | float, num_steps: int) -> int:
    """A `Duration` as steps of a run of `num_steps`."""
    return duration if isinstance(duration, int) else round(duration * num_steps)


class ScheduleSpec(TypedSpec):
    """The learning rate over the run, as a factor on its peak. It rises linearly during `warmup`."""

    warmup: Duration = 0


@register_spec
class CosineSpec(ScheduleSpec):
    """Half a cosine from 1 to `min_ratio` after the warmup (arXiv:1608.03983)."""

    type: Literal["cosine"] = "cosine"
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1


@register_spec
class WSDSpec(ScheduleSpec):
    """Warmup, stable, decay (arXiv:2404.06395): constant, then a straight line to `min_ratio` over the last `decay`."""

    type: Literal["wsd"] = "wsd"
    decay: Duration = 0.2
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0


@register_spec
class ConstantSpec(ScheduleSpec):
    """The peak, after the warmup."""

    type: Literal["constant"] = "constant"


class TrainSpec(Spec):
    """The loop: how much, how often, from which seed."""

    steps: PositiveInt
    """Optimizer steps of the whole run."""
    batch_size: PositiveInt
    """Sequences of an optimizer step."""
    micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Sequences that are worked on at once; gradients are accumulated over the others. `auto`: the plan's choice."""
    seq_len: PositiveInt
    """Tokens per sequence."""
    packing: Literal["stream", "documents"] = "stream"
    """`documents`: no document of a row hears of another, and each counts its positions from 0."""
    batch_warmup: Duration = 0
    """How long the batch grows, in equal parts, from `batch_start` sequences to `batch_size`."""
    batch_start: PositiveInt | None = None
    """Sequences of the first step; null: an eighth of a batch. Given only with `batch_warmup`."""
    ema: Fraction | None = None
    """Decay of a moving average of the weights, which evaluations report beside the weights; null: none is kept."""
    noise_scale: bool = False
    """Measure the gradient noise scale every `log_every` steps, for one more pass over a part of the batch."""
    clip_norm: PositiveFloat | None = 1.0
    """Longest gradient, all parameters together; null: no clipping."""
    recompute: Literal["auto", "none", "layer"] = "auto"
    """`layer` keeps only each layer's input and computes the rest again in the backward pass. `auto`: where nothing
    else fits."""
    check_memory: bool = True
    """Refuse a run that is predicted to need more memory than is free."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations; null: only at the end."""
    eval_tokens: PositiveInt = 65536
    """Most held-out tokens that one evaluation reads."""
    seed: NonNegativeInt = 0
    """Of the initial weights, the batches and the sample."""
    log_every: PositiveInt = 10
    """Steps that one report of routing health covers."""
    watch: WatchSpec = WatchSpec()
    """What becomes of steps that go wrong."""
    sample_prompt: str = ""
    sample_tokens: NonNegativeInt = 0
    """Tokens to write after the prompt at the end; 0: no sample."""
    sample_temperature: NonNegativeFloat = 0.8

    @model_validator(mode="after")
    def _check(self) -> TrainSpec:
        if self.micro_batch != "auto" and self.batch_size % self.micro_batch:
            rule = f"must divide train.batch_size, {self.batch_size}"
            raise problem("micro_batch", self.micro_batch, rule, "or auto")
        if self.batch_start is not None and not self.batch_warmup:
            raise problem("batch_start", self.batch_start, "has no effect without train.batch_warmup")
        if self.batch_start is not None and self.batch_start > self.batch_size:
            raise problem("batch_start", self.batch_start, f"must be at most train.batch_size, {self.batch_size}")
        if self.noise_scale and self.batch_size < 2:
            raise problem("noise_scale", self.noise_scale, "needs a train.batch_size of at least 2")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of one optimizer step."""
        return self.batch_size * self.seq_len


class CheckpointSpec(Spec):
    """When to save, and where to go on from."""

    asynchronous: bool = False
    """Write while training goes on, from a copy in the memory of the host; of runs with several processes."""
    every: PositiveInt | None = None
    """Steps between checkpoints; null: only at the end or when interrupted."""
    keep: PositiveInt = 2
    """Newest checkpoints that stay on disk; beside them one or two older ones, when these are all from the last 30
    steps: what goes wrong may take some steps to show."""
    resume: str = "never"
    """`never`, `auto` or the directory of a run, which is then continued in place.

    `auto` continues the run directory itself when it holds a checkpoint, else the newest unfinished run of the same
    settings under `outputs/`; when there is none it starts a new run.
    """


class LoggerSpec(TypedSpec):
    """A service that follows the run, beside the files in the run directory."""


@register_spec
class NoLoggerSpec(LoggerSpec):
    type: Literal["none"] = "none"


@register_spec
class WandbSpec(LoggerSpec):
    """Weights & Biases. `offline` writes into the run directory and needs no account."""

    type: Literal["wandb"] = "wandb"
    mode: Literal["offline", "online"] = "offline"
    project: str = "zoo"
    entity: str | None = None
    """Account or team; absent: the default one of the login."""
    name: str | None = None
    """Absent: the name of the run directory."""


class ParallelSpec(TypedSpec):
    """How the model and the batch are divided over devices."""


@register_spec
class AutoParallelSpec(ParallelSpec):
    """Let the planner choose."""

    type: Literal["auto"] = "auto"


@register_spec
class ManualParallelSpec(ParallelSpec):
    """Degrees given by hand."""

    type: Literal["manual"] = "manual"
    tp: PositiveInt = 1
    """Tensor parallel."""
    pp: PositiveInt = 1
    """Pipeline parallel."""
    vp: PositiveInt = 1
    """Virtual pipeline stages per device."""
    cp: PositiveInt = 1
    """Context parallel."""
    ep: PositiveInt = 1
    """Expert parallel."""
    etp: PositiveInt = 1
    """Tensor parallel inside the experts."""
    dp: PositiveInt = 1
    """Data parallel."""
    shard: PositiveInt = 1
    """Of the dp * cp devices with the same part of the model, how many share its weights."""

    @property
    def degrees(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("tp", "pp", "vp", "cp", "ep", "etp", "dp", "shard")}

    @property
    def num_devices(self) -> int:
        """Experts live inside the data and tensor groups, and virtual stages share a device: neither adds devices."""
        return math.prod((self.tp, self.pp, self.cp, self.dp))
