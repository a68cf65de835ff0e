"""A layout applied to a model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from zoo.blocks.base import Context
from zoo.decoder import Decoder, Losses
from zoo.parallel.context import cut_ends, cut_rows
from zoo.parallel.experts import spread_experts
from zoo.parallel.legal import check, check_rows
from zoo.parallel.mesh import World
from zoo.parallel.pipeline import cut_layers
from zoo.parallel.shard import shard
from zoo.parallel.tensor import cut_tensors


def parallelize(model: Decoder, world: World, compute: torch.dtype | None = None) -> Decoder:
    """Spread a model over the processes of `world`, in place. Every process has the whole model before, or its meta.

    Afterwards parameters are DTensors with their names and whole shapes; `model.loss` takes the rows of this process,
    the same ones along tp and cp, and returns the mean over the rows of all, of which its gradient is this process's
    part: after `backward`, the gradients are those of the mean. With several stages it is for evaluation;
    `zoo.parallel.accumulate` makes gradients with any layout.

    Args:
        compute: the dtype of arithmetic and of what travels, where weights are shared; None: that of the weights.

    Raises:
        ConfigError: the layout does not go with the model, or has not been tested with it.
    """
    layout = world.layout
    check(model, layout)
    pipeline = cut_layers(model, world) if layout.pp > 1 else None
    if layout.cp > 1:  # inside of what tp gathers
        cut_rows(model, world.cp)
    if layout.tp > 1:
        cut_tensors(model, world.tp)
    if layout.cp > 1:  # around what tp scatters
        cut_ends(model, world.cp)
    if layout.ep * layout.etp > 1:
        mesh = world.experts["ep", "etp"] if layout.etp > 1 else world.experts["ep"]
        for moe in model.moe_layers().values():
            spread_experts(moe.experts, mesh)
    if pipeline is not None:
        for stage in pipeline.stages:
            shard(stage, world, compute)
        if compute is not None and layout.dp * layout.cp > 1:
            pipeline.dtype = compute
        model.loss = pipeline.loss  # type: ignore[method-assign]
        return model
    shard(model, world, compute)
    register_fsdp_forward_method(model, "loss")
    _share_losses(model, world)
    return model


def _share_losses(model: Decoder, world: World) -> None:
    compute = model.loss

    def loss(tokens: Tensor, targets: Tensor, context: Context | None = None) -> Losses:
        context = context or Context.of(tokens)
        check_rows(tokens, context, world.layout)
        context.peers = world
        own = compute(tokens, targets, context)
        names = list(own.items)
        # fp64, so that the sum is not one of rounded parts.
        values = world.sum_over_tokens(torch.stack([own.items[name].to(torch.float64) for name in names]))
        items = {name: value.to(own.items[name].dtype) for name, value in zip(names, values, strict=True)}
        return Losses(own.total, items, own.num_tokens)

    model.loss = loss  # type: ignore[method-assign]
