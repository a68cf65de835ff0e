"""Expert parallelism: every process holds some of the experts, and tokens travel to those that they chose.

Loads may be uneven to any degree, and a process may receive nothing. As many bytes travel as rows are sent elsewhere,
and the gradients travel back in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from zoo.blocks.autocast import autocast_dtype
from zoo.blocks.dispatch import Dispatch, combine, gather
from zoo.blocks.experts import Experts
from zoo.parallel.cuts import Cut, cut_parameters, own_parameters
from zoo.parallel.mesh import waited

Loads = Callable[[int, int], tuple[list[int], list[int]]]
"""From the rows of a process and the number of processes along `ep`: the rows to each of them, and from each."""
_PLANNED: ContextVar[Loads | None] = ContextVar("planned_loads", default=None)


@contextmanager
def planned_loads(loads: Loads) -> Iterator[None]:
    """Within, as many rows travel as `loads` says, whatever the tokens choose: for tensors that hold no values."""
    token = _PLANNED.set(loads)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def spread_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Divide the experts among the processes along `ep`, and the width of each among those along `etp`.

    Args:
        mesh: [ep, etp], or [ep].
    """
    num_experts = len(experts.down)
    cuts = {name: _cut_of(name, experts, mesh) for name, _ in experts.named_parameters()}
    cut_parameters(experts, cuts, mesh)
    compute = experts.forward

    def forward(x: Tensor, weights: Tensor | None, indices: Tensor) -> Tensor:
        x = x.to(autocast_dtype(x))
        dispatch = Dispatch.of(indices, num_experts)
        route = _Route.of(dispatch, mesh["ep"])
        rows, mine = route.there(gather(x, dispatch)), route.experts()
        shared = _Shared.of(mine, mesh)
        with own_parameters(experts, cuts):
            y = compute(shared.spread(rows), None, shared.experts[:, None])
        return combine(route.back(shared.add(y)), weights, dispatch)

    experts.forward = forward  # type: ignore[method-assign]


def _cut_of(name: str, experts: Experts, mesh: DeviceMesh) -> Cut:
    if mesh.ndim == 1:
        return Cut((Shard(0),))
    etp = mesh["etp"]
    if name == "down_bias":
        return Cut((Shard(0), Replicate()), silent=etp.get_local_rank() > 0)
    if name == "gate_up_bias":
        halves = torch.arange(experts.get_parameter(name).shape[1]).chunk(2)
        own = torch.cat([half.chunk(etp.size())[etp.get_local_rank()] for half in halves])
        return Cut((Shard(0), Replicate()), rows=own, axis=1)
    # Of gate_up, the same part of the gate's rows and of the up rows below them.
    widths: dict[str, Placement] = {"down": Shard(2), "gate_up": _StridedShard(1, split_factor=2)}
    return Cut((Shard(0), widths.get(name, Shard(1))))


class _Route(NamedTuple):
    """How the rows of a process, sorted by expert, are sent to the experts' processes."""

    ep: DeviceMesh
    sent: list[int]
    """Rows to each process."""
    received: list[int]
    """Rows from each process."""
    counts: Tensor
    """[ep, e / ep] int64: of them, those for each expert here."""

    @classmethod
    def of(cls, dispatch: Dispatch, ep: DeviceMesh) -> _Route:
        """Exchange counts. Waits for the device, which is how the sizes of what follows are known."""
        counts = dispatch.ends.to(torch.int64).diff(prepend=dispatch.ends.new_zeros(1, dtype=torch.int64))
        arriving = waited(funcol.all_to_all_single(counts, None, None, ep)).view(ep.size(), -1)
        if (loads := _PLANNED.get()) is not None:
            return cls(ep, *loads(dispatch.order.numel(), ep.size()), arriving)
        sent, received = torch.stack((counts.view(ep.size(), -1).sum(1), arriving.sum(1))).tolist()
        return cls(ep, sent, received, arriving)

    def experts(self) -> Tensor:
        """[m] int64: of each row that arrives, its expert among those here."""
        number = torch.arange(self.counts.shape[1], device=self.counts.device).expand_as(self.counts)
        return number.flatten().repeat_interleave(self.counts.flatten(), output_size=sum(self.received))

    def there(self, rows: Tensor) -> Tensor:
        """The rows that arrive [m, d] when rows [n, d] are sent. Differentiable."""
        return _exchange(rows, self.received, self.sent, self.ep)

    def back(self, rows: Tensor) -> Tensor:
        """The rows [n, d] that come back when rows [m, d] are returned. Differentiable."""
        return _exchange(rows, self.sent, self.received, self.ep)


class _Shared(NamedTuple):
    """The rows that the processes along `etp`, which share the experts here, work on together."""

    etp: DeviceMesh | None
    sizes: list[int]
    """Rows of each of these processes."""
    experts: Tensor
    """[sum of sizes] int64: the experts of all rows."""

    @classmethod
    def of(cls, experts: Tensor, mesh: DeviceMesh) -> _Shared:
        """Exchange how many rows there are, and their experts [m] int64."""
        if mesh.ndim == 1:
            return cls(None, [len(experts)], experts)
        etp = mesh["etp"]
        arriving = waited(funcol.all_gather_single(experts.new_tensor([len(experts)]), 0, etp))
        sizes = arriving.tolist() if _PLANNED.get() is None else [len(experts)] * etp.size()
        return cls(etp, sizes, _exchange(experts.repeat(etp.size()), sizes, [len(experts)] * etp.size(), etp))

    def spread(self, rows: Tensor) -> Tensor:
        """All rows [sum of sizes, d] of the own ones [m, d]. Differentiable."""
        if self.etp is None:
            return rows
        return _exchange(rows.repeat(self.etp.size(), 1), self.sizes, [len(rows)] * self.etp.size(), self.etp)

    def add(self, rows: Tensor) -> Tensor:
        """The sum over all processes of the own rows [m, d] of rows [sum of sizes, d]. Differentiable."""
        if self.etp is None:
            return rows
        own = self.sizes[self.etp.get_local_rank()]
        parts = _exchange(rows, [own] * self.etp.size(), self.sizes, self.etp)
        return parts.view(self.etp.size(), own, rows.shape[1]).sum(0)


def _exchange(rows: Tensor, received: list[int], sent: list[int], mesh: DeviceMesh) -> Tensor:
    return waited(funcol.all_to_all_single(rows.contiguous(), received, sent, mesh))
