"""Which operations are collectives, and what they send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group as resolve
from torch.distributed.distributed_c10d import GroupName

from zoo.dryrun.ledger import Travel

_NAMES = {
    "c10d::allreduce_": "all_reduce",
    "c10d::allgather_": "all_gather",
    "c10d::_allgather_base_": "all_gather",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::alltoall_": "all_to_all",
    "c10d::broadcast_": "broadcast",
    "c10d::send": "send",
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_reduce_": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::all_gather_into_tensor_out": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::all_to_all_single": "all_to_all",
    "_c10d_functional::broadcast": "broadcast",
}


def travel_of(func: Any, args: Any, axis_of: Callable[[str], str]) -> tuple[Travel, int] | None:
    """A collective, and the bytes that this process sends in it if it is done in a ring; None: it is none."""
    name = func._schema.name
    op = _NAMES.get(name)
    if op is None:
        return None
    group = _group(func, args)
    size = dist.get_world_size(group)
    data = [args[1]] if name.endswith("_base_") else args[0] if isinstance(args[0], list | tuple) else [args[0]]
    data = [part for item in data for part in (item if isinstance(item, list | tuple) else [item])]
    nbytes = sum(part.numel() * part.itemsize for part in data)
    dtype = str(data[0].dtype).removeprefix("torch.")
    key = Travel(op, axis_of(group.group_name), size, dtype)
    return key, _sent(op, nbytes, size, args, dist.get_rank(group), data[0])


def _sent(op: str, nbytes: int, size: int, args: Any, rank: int, data: torch.Tensor) -> int:
    if op == "all_gather":
        return nbytes * (size - 1)
    if op == "reduce_scatter":
        return nbytes * (size - 1) // size
    if op == "all_reduce":
        return 2 * nbytes * (size - 1) // size
    if op == "all_to_all":
        splits = next((arg for arg in reversed(args[:3]) if isinstance(arg, list | tuple) and len(arg) == size), None)
        if splits is None:
            return nbytes * (size - 1) // size
        return nbytes - int(splits[rank]) * (nbytes // max(len(data), 1))
    return nbytes


def _group(func: Any, args: Any) -> dist.ProcessGroup:
    for arg, described in zip(args, func._schema.arguments, strict=False):
        if described.name in ("group_name", "process_group"):
            if isinstance(arg, str):
                return resolve(GroupName(arg))
            return dist.ProcessGroup.unbox(arg)
    raise TypeError(f"{func}: has no process group")
