"""The processes of a run as meshes with named axes, numbered as the planner assumes (`zoo.plan.collectives`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from zoo.plan.layout import Layout
from zoo.spec.base import ConfigError


@dataclass(frozen=True)
class World:
    """All processes of a run: as the dense parts of a model see them, as the experts do, and by their tokens.

    Neighbours differ in the last axis. All meshes hold the same processes, so the axes of the experts cut across those
    of the dense parts: the processes that share the experts of a layer may differ in their rows, or in their place
    along `tp`.
    """

    layout: Layout
    dense: DeviceMesh
    """[pp, replicate, shard, tp]. The processes along `replicate` and `shard` have different tokens; along `shard` they
    share the weights, or, with `layout.shard` of 1, only the gradients and the optimizer's states."""
    experts: DeviceMesh
    """[pp, replicate, shard, ep, etp]."""
    tokens: DeviceMesh
    """[pp, dp, cp, tp]. The processes along `dp` have different rows, those along `cp` other tokens of the same rows;
    along `tp` they share their tokens, and along `pp` the layers that these pass."""

    @classmethod
    def of(cls, layout: Layout, device_type: str = "cpu") -> World:
        """The meshes of a layout. Every process has to make them: they start process groups.

        Raises:
            ConfigError: another number of processes, or degrees that do not divide each other.
        """
        processes = dist.get_world_size()
        if processes != layout.num_devices:
            raise ConfigError(
                f"layout: found {layout}, which is for {layout.num_devices} processes; "
                f"there are {processes}: start as many, or change its dp"
            )
        dense = (layout.pp, *_replicas(layout.dp * layout.cp, layout.shard, "shard", "dp * cp"), layout.tp)
        expert_dp, rest = divmod(layout.dp * layout.cp * layout.tp, layout.ep * layout.etp)
        if rest:
            raise ConfigError(
                f"layout.ep: found ep {layout.ep} and etp {layout.etp}; their product must divide dp * cp * tp, "
                f"{layout.dp * layout.cp * layout.tp}"
            )
        shared = 1
        if layout.shard > 1:  # as `Points.expert_shard`
            shared = min(max(layout.shard * layout.tp // (layout.ep * layout.etp), 1), expert_dp)
        replicas = _replicas(expert_dp, shared, "ep", "the processes with the same experts")
        experts = (layout.pp, *replicas, layout.ep, layout.etp)
        return cls(
            layout,
            init_device_mesh(device_type, dense, mesh_dim_names=("pp", "replicate", "shard", "tp")),
            init_device_mesh(device_type, experts, mesh_dim_names=("pp", "replicate", "shard", "ep", "etp")),
            init_device_mesh(
                device_type, (layout.pp, layout.dp, layout.cp, layout.tp), mesh_dim_names=("pp", "dp", "cp", "tp")
            ),
        )

    @property
    def tp(self) -> DeviceMesh:
        """Along tp."""
        return self.dense["tp"]

    @property
    def cp(self) -> DeviceMesh:
        """Along cp."""
        return self.tokens["cp"]

    @property
    def pp(self) -> DeviceMesh:
        """Along pp."""
        return self.tokens["pp"]

    @property
    def rows_index(self) -> int:
        """Which of the `layout.dp` parts of a batch's rows this process works on."""
        return self.tokens.get_local_rank("dp")

    def sum_within_rows(self, counts: Tensor) -> Tensor:
        """The sum over the processes that hold other tokens of the same rows (`zoo.blocks.base.Peers`)."""
        return summed(counts, self.tokens, ("cp", "tp"))

    def sum_over_rows(self, counts: Tensor) -> Tensor:
        """The sum over the processes that hold other rows (`zoo.blocks.base.Peers`)."""
        return summed(counts, self.tokens, ("dp",))

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """The sum over the processes with the same layers."""
        return summed(values, self.tokens, ("dp", "cp", "tp"))

    def sum_all(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return summed(values, self.tokens, ("pp", "dp", "cp", "tp"))


def summed(values: Tensor, mesh: DeviceMesh, axes: Sequence[str]) -> Tensor:
    """The sum of `values` over the processes along `axes`, without gradients."""
    values = values.detach()
    for axis in axes:
        if mesh[axis].size() > 1:
            values = waited(funcol.all_reduce(values, "sum", mesh[axis]))
    return values


def waited(result: Tensor) -> Tensor:
    """The result of a collective, when it is there."""
    return funcol.wait_tensor(result) if isinstance(result, funcol.AsyncCollectiveTensor) else result


def _replicas(processes: int, shared: int, field: str, whole: str) -> tuple[int, int]:
    """The sizes of the axes `replicate` and `shard`. With a degree of 1 all processes share the optimizer's states."""
    if processes % shared:
        raise ConfigError(
            f"layout.{field}: found {shared} processes that share weights; must divide {whole}, {processes}"
        )
    return (1, processes) if shared == 1 else (processes // shared, shared)
