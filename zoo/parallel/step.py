"""The arithmetic of a training step on many processes: what `zoo.train.trainer` does on one."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zoo.blocks.base import Context
from zoo.blocks.linear_loss import IGNORED
from zoo.decoder import Decoder
from zoo.parallel.mesh import World
from zoo.parallel.pipeline import pipeline_of, stages_with
from zoo.parallel.shard import synchronize
from zoo.train.trainer import Autocast, Batch, MakeContext


def accumulate(
    model: Decoder,
    batch: Batch,
    batch_size: int,
    autocast: Autocast,
    world: World,
    context: MakeContext = Context.of,
) -> dict[str, float]:
    """As `zoo.train.trainer.accumulate` does for the rows of all processes, of which `batch` is this one's part.

    Every process has as many rows. `.grad` then is the sum over all of them.
    """
    pipeline = pipeline_of(model)
    if pipeline is not None:
        means = pipeline.accumulate(batch, batch_size, autocast, context)
        finish_gradients(model.parameters())
        pipeline.share_ends()
        return means
    inputs, targets = batch
    num_tokens = int(world.sum_over_rows((targets != IGNORED).sum()))
    terms: dict[str, Tensor] = {}
    micro_batches = list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))
    for index, (micro_inputs, micro_targets) in enumerate(micro_batches):
        synchronize(model, world, last=index == len(micro_batches) - 1)
        with autocast():
            losses = model.loss(micro_inputs, micro_targets, context(micro_inputs))
        weight = losses.num_tokens / max(1, num_tokens)
        (losses.total * weight).backward()
        for name, value in losses.items.items():
            terms[name] = terms.get(name, torch.zeros_like(value)) + value * weight
    finish_gradients(model.parameters())
    return {name: float(value) for name, value in terms.items()}


def finish_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients whose parts are still on several processes: those that `fully_shard` does not look after."""
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
            parameter.grad = grad.redistribute(placements=parameter.placements)


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float | None, world: World) -> float:
    """Scale all gradients together so that their norm over all processes is at most `clip_norm`; the norm before."""
    parameters = list(parameters)
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = grad_norm(parameters, world)
    if clip_norm is not None and math.isfinite(norm):  # else every gradient would become what one of them is
        factor = min(1.0, clip_norm / (norm + 1e-6))  # as torch does
        torch._foreach_mul_([_own(grad) for grad in found], factor)
    return norm


def grad_norm(parameters: Iterable[nn.Parameter], world: World) -> float:
    """The norm of gradients of which every process has its part. One sum over all processes."""
    by_copies: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            copies = _copies(parameter.grad, world) * stages_with(parameter)
            by_copies.setdefault(copies, []).append(_own(parameter.grad))
    device = torch.device(world.dense.device_type)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for copies, parts in by_copies.items():
        total += nn.utils.get_total_norm(parts).to(torch.float64).square() / copies
    return float(world.sum_all(total).sqrt())


def share_counts(model: Decoder, world: World) -> None:
    """Make the routing counters of this step those of all processes. Once a step, before they are read."""
    layers = list(model.moe_layers().values())
    if layers:
        counts = world.sum_over_rows(world.sum_within_rows(torch.cat([moe.tokens_per_expert for moe in layers])))
        for moe, total in zip(layers, counts.split([len(moe.tokens_per_expert) for moe in layers]), strict=True):
            moe.tokens_per_expert.copy_(total)


def _own(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _copies(grad: Tensor, world: World) -> int:
    """How many processes have the same part of a gradient."""
    copies = world.layout.num_devices // world.layout.pp
    if not isinstance(grad, DTensor):
        return copies
    parts = [grad.device_mesh.size(axis) for axis, place in enumerate(grad.placements) if not place.is_replicate()]
    return copies // math.prod(parts)
