"""One optimizer step, one evaluation: the arithmetic of training, without files and reporters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from zoo.blocks.base import Context
from zoo.blocks.linear_loss import IGNORED
from zoo.train.events import Evaluated, LayerHealth
from zoo.train.gauges import local_part
from zoo.train.routing import layer_health

if TYPE_CHECKING:
    from zoo.decoder import Decoder
    from zoo.spec.moe import MoESpec

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, int64 [b, s] each. The target IGNORED does not count."""
MakeContext = Callable[[Tensor], Context]
"""The context of rows [b, s]: `Context.of`, or one that keeps their documents apart."""
Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured."""

    losses: dict[str, float]
    grad_norm: float
    """Over all parameters, before clipping."""

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (*self.losses.values(), self.grad_norm)))


class Balanced(Protocol):
    """Counts the choices of experts, and balances by them; a `zoo.blocks.moe.MoE`, or what stands for it."""

    spec: MoESpec
    tokens_per_expert: Tensor

    def update_bias(self) -> None: ...


class RoutingCounter:
    """Choices that each expert of each MoE layer received since the last report."""

    def __init__(self, layers: Mapping[int, Balanced]) -> None:
        self._layers = layers
        self._totals = {index: torch.zeros_like(moe.tokens_per_expert) for index, moe in layers.items()}

    def step_done(self) -> None:
        """After each optimizer step: balance by the step's counts, then move them into the totals."""
        for index, moe in self._layers.items():
            moe.update_bias()
            self._totals[index] += moe.tokens_per_expert
            moe.tokens_per_expert.zero_()

    def step_skipped(self) -> None:
        """After a step that was not taken: forget its counts."""
        for moe in self._layers.values():
            moe.tokens_per_expert.zero_()

    def report(self) -> tuple[LayerHealth, ...]:
        """Judge the totals and start new ones."""
        health = tuple(layer_health(index, total.tolist()) for index, total in self._totals.items())
        for total in self._totals.values():
            total.zero_()
        return health

    def state(self) -> dict[str, list[int]]:
        """The totals as JSON."""
        return {str(index): total.tolist() for index, total in self._totals.items()}

    def restore(self, state: dict[str, list[int]]) -> None:
        """Take over the totals of a checkpoint."""
        for index, total in self._totals.items():
            total.copy_(torch.tensor(state[str(index)]))


def accumulate(
    model: Decoder, batch: Batch, batch_size: int, autocast: Autocast, context: MakeContext = Context.of
) -> dict[str, float]:
    """Add the gradient of the mean loss over all targets to `.grad`, in micro-batches of `batch_size` rows.

    Each micro-batch weighs as much as it has targets that count, so the gradient of the cross-entropy is that of the
    whole batch at once. Balance terms are means over micro-batches: they see one micro-batch at a time.

    Returns:
        Every term of the objective, without coefficients, weighed in the same way.
    """
    inputs, targets = batch
    num_tokens = int((targets != IGNORED).sum())
    terms: dict[str, Tensor] = {}
    for micro_inputs, micro_targets in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        with autocast():
            losses = model.loss(micro_inputs, micro_targets, context(micro_inputs))
        weight = losses.num_tokens / max(1, num_tokens)
        (losses.total * weight).backward()
        for name, value in losses.items.items():
            terms[name] = terms.get(name, torch.zeros_like(value)) + value * weight
    return {name: float(value) for name, value in terms.items()}


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float | None) -> float:
    """Scale all gradients together so that their norm is at most `clip_norm`; the norm before."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if clip_norm is not None and norm.isfinite():  # else every gradient would become what one of them is
        clip_grads_with_norm_(trained, clip_norm, norm)
    return float(norm)


def nonfinite(result: StepResult, model: nn.Module) -> str:
    """Which loss or gradient is no number, in words; empty when all are finite."""
    if result.finite:
        return ""
    bad = [f"the loss term {name} is {value}" for name, value in result.losses.items() if not math.isfinite(value)]
    if not bad and not math.isfinite(result.grad_norm):
        grads = ((name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None)
        names = [name for name, grad in grads if not grad.isfinite().all()]
        bad = [f"the gradient of {name} is not finite" for name in names[:3]] or ["the gradient norm overflows"]
    return ", ".join(bad)


def sound_weights(model: nn.Module) -> bool:
    """Whether those that this process holds are finite, and of a length that is."""
    norms = torch._foreach_norm([local_part(parameter.detach()) for parameter in model.parameters()])
    return bool(torch.stack([norm.to(torch.float32).cpu() for norm in norms]).isfinite().all())


@torch.no_grad()
def evaluate(
    model: Decoder,
    windows: Batch,
    *,
    batch_size: int,
    autocast: Autocast,
    step: int,
    bytes_per_token: float,
    context: MakeContext = Context.of,
) -> Evaluated:
    """Mean loss over held-out `windows`, in evaluation mode: routing counters and gradients stay as they are."""
    start = time.perf_counter()
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, num_tokens = 0.0, 0
    for inputs, targets in zip(*(part.split(batch_size) for part in windows), strict=True):
        inputs, targets = inputs.to(device), targets.to(device)
        with autocast():
            losses = model.loss(inputs, targets, context(inputs))
        count = int(losses.num_tokens)
        total += float(losses.items["cross_entropy"]) * count
        num_tokens += count
    model.train(was_training)
    loss = total / num_tokens
    bits = bits_per_byte(loss, bytes_per_token)
    return Evaluated(step, loss, bits, num_tokens, time.perf_counter() - start)


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats per token as bits per byte of text."""
    return loss / math.log(2) / bytes_per_token
