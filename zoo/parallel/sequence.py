"""Sequence parallelism (arXiv:2205.05198): tokens between blocks are cut along tp, blocks see all of them."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def gather_tokens(x: Tensor, tp: DeviceMesh) -> Tensor:
    """All tokens [..., s, d] of the own ones x [..., s / tp, d]. Gradients are summed on their way back."""
    cut = DTensor.from_local(x, tp, [Shard(x.ndim - 2)], run_check=False)
    return cut.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def scatter_tokens(y: Tensor, tp: DeviceMesh) -> Tensor:
    """The own tokens [..., s / tp, d] of the sum over all processes of y [..., s, d]."""
    parts = DTensor.from_local(y, tp, [Partial()], run_check=False)
    return parts.redistribute(placements=[Shard(y.ndim - 2)]).to_local()


def own_tokens(x: Tensor, tp: DeviceMesh) -> Tensor:
    """The own columns [b or 1, s / tp] of x [b or 1, s], which all processes have."""
    return x.chunk(tp.size(), 1)[tp.get_local_rank()]
