"""Fully sharded data parallelism: torch's `fully_shard`, layer by layer, and experts apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from zoo.blocks.experts import Experts
from zoo.blocks.layer import Layer, MTPBlock
from zoo.parallel.mesh import World


def shard(model: nn.Module, world: World, compute: torch.dtype | None = None) -> None:
    """Share weights, gradients and the optimizer's states of all layers among the processes with other rows.

    Gradients are summed, not averaged. With `layout.shard` of 1, a process keeps its weights from the first pass of a
    step to its last (arXiv:1910.02054, stage 2); else it gathers those of each layer for each pass (stage 3).

    Args:
        model: a decoder, or the layers of one stage of it.
        compute: the dtype in which weights are gathered, worked with, and their gradients summed; None: their own.
    """
    # What goes in has the dtype already; to cast it, torch would copy the `Context` that layers share.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=compute, cast_forward_inputs=False)
    everything = set(model.parameters())
    ignored = {parameter for parameter in everything if not parameter.requires_grad}
    mesh, expert_mesh = _mesh(world.dense), _mesh(world.experts)
    if world.layout.tp * world.layout.ep * world.layout.etp > 1:
        # Else the experts are weights like all others.
        for experts in [module for module in model.modules() if isinstance(module, Experts)]:
            if expert_mesh is not None:
                _shard(experts, expert_mesh, world, policy)
            else:
                ignored |= set(experts.parameters())
    if mesh is not None:
        # Whole MTP blocks, not the layers in them.
        blocks = [module for module in model.modules() if isinstance(module, MTPBlock)]
        inner = {id(layer) for block in blocks for layer in block.layers}
        layers = [module for module in model.modules() if isinstance(module, Layer) and id(module) not in inner]
        for layer in [*layers, *blocks]:
            _shard(layer, mesh, world, policy, ignored)
        _shard(model, mesh, world, policy, ignored)
    elif any(isinstance(module, FSDPModule) for module in model.modules()):
        fully_shard(model, mesh=expert_mesh, ignored_params=everything)  # no weights, but the order of the experts


def synchronize(model: nn.Module, world: World, last: bool) -> None:
    """Say before a backward pass whether it is the last one of a step, in which gradients are summed.

    Between, processes that share their weights share their gradients too.
    """
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        module.set_is_last_backward(last)
        if keeps_weights(world):
            module.set_requires_gradient_sync(last, recurse=False)
            module.set_reshard_after_backward(last, recurse=False)
        else:
            module.set_requires_all_reduce(last, recurse=False)


def release(model: nn.Module) -> None:
    """Let go of the weights of others that passes without a backward one have gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def keeps_weights(world: World) -> bool:
    """Whether processes have their weights whole during a step."""
    return world.layout.shard == 1


def _shard(
    module: nn.Module,
    mesh: DeviceMesh,
    world: World,
    policy: MixedPrecisionPolicy,
    ignored: set[nn.Parameter] | None = None,
) -> None:
    fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=not keeps_weights(world),
        shard_placement_fn=_placement(mesh.size(mesh.ndim - 1)),
        mp_policy=policy,
        ignored_params=ignored or set(),
    )
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def _placement(size: int) -> Callable[[nn.Parameter], Shard | None]:
    def choose(parameter: nn.Parameter) -> Shard | None:
        """The first axis, or, where that is not cut evenly, the first one that is and that nothing else cuts.

        By the whole shape: the choice must be the same for processes with different parts.
        """
        if not isinstance(parameter, DTensor):
            return None
        parts, striped = [1] * parameter.ndim, False
        for place, processes in zip(parameter.placements, parameter.device_mesh.shape, strict=True):
            if isinstance(place, Shard | _StridedShard):
                parts[place.dim] *= processes
                striped |= isinstance(place, _StridedShard)
        # DTensor cannot put together again what is cut in stripes along two axes.
        if parameter.shape[0] % (parts[0] * size) == 0 and not striped:
            return None
        even = [axis for axis, part in enumerate(parts) if part == 1 and parameter.shape[axis] % size == 0]
        return Shard(even[0]) if even else None

    return choose


def _mesh(mesh: DeviceMesh) -> DeviceMesh | None:
    """The axes to shard along; None: there is nobody to share with."""
    if mesh["replicate"].size() > 1:
        return mesh["replicate", "shard"]
    return mesh["shard"] if mesh["shard"].size() > 1 else None
