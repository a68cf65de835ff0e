"""What a process holds of a tensor, as boxes of the whole one: what checkpoints are written and read by."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

Run = tuple[int, int, int]
"""Neighbouring places along an axis: the first one in the whole tensor, the first one in the part, how many."""


Known = dict[tuple[int, DeviceMesh, tuple[Placement, ...]], tuple[Run, ...]]
"""Which places of an axis this process holds, by the axis' length and how it is cut."""


class Pieces:
    """The part of a tensor that a process holds, in torch's protocol for what can be saved and loaded.

    torch's own answer for a DTensor is one box. Where the gate and up rows of experts are cut alike, a process holds
    two.
    """

    def __init__(self, tensor: Tensor, known: Known | None = None) -> None:
        """
        Args:
            tensor: A DTensor, or one that all processes have whole.
            known: What was found out about other tensors, which is added to.
        """
        self.shape = tensor.shape
        self.local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        self._boxes = list(_boxes(tensor, {} if known is None else known))

    def copied(self) -> Pieces:
        """The same with its numbers copied into the memory of the host."""
        copy = Pieces.__new__(Pieces)
        copy.shape, copy._boxes = self.shape, self._boxes
        copy.local = self.local.to("cpu", copy=True)
        return copy

    def size(self) -> torch.Size:
        """Of the whole tensor."""
        return self.shape

    def boxes(self) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Each box: where it lies in the whole tensor, and its numbers here."""
        for box in self._boxes:
            yield tuple(slice(start, start + length) for start, _, length in box), self._view(box)

    def __create_write_items__(self, fqn: str, value: object) -> list[WriteItem]:
        del value
        properties = TensorProperties(dtype=self.local.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(run[0] for run in box), torch.Size(run[2] for run in box))
            for box in self._boxes
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for box in self._boxes:
            if index.offset == torch.Size(run[0] for run in box):
                return self._view(box)
        raise ValueError(f"{index.fqn}: no part of it begins at {index.offset}")

    def _view(self, box: tuple[Run, ...]) -> Tensor:
        return self.local[tuple(slice(start, start + length) for _, start, length in box)]


def _boxes(tensor: Tensor, known: Known) -> Iterator[tuple[Run, ...]]:
    """The boxes that a process holds, each as a run along every axis; none where it holds nothing."""
    if not isinstance(tensor, DTensor):
        return iter([tuple((0, 0, length) for length in tensor.shape)])
    axes = []
    for axis, length in enumerate(tensor.shape):
        key = length, tensor.device_mesh, _along(tensor.placements, axis)
        if key not in known:
            known[key] = _runs(*key)
        axes.append(known[key])
    return product(*axes)


def _along(placements: tuple[Placement, ...], axis: int) -> tuple[Placement, ...]:
    """How `placements` cut one axis, as placements of a tensor that has no other."""

    def of(placement: Placement) -> Placement:
        if isinstance(placement, _StridedShard) and placement.dim == axis:
            return _StridedShard(0, split_factor=placement.split_factor)
        if isinstance(placement, Shard) and placement.dim == axis:
            return Shard(0)
        return Replicate()

    return tuple(of(placement) for placement in placements)


def _runs(length: int, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> tuple[Run, ...]:
    """The places along an axis of `length` that this process holds. torch itself says which they are."""
    if all(placement.is_replicate() for placement in placements):
        return ((0, 0, length),) if length else ()
    places = torch.arange(length, device=mesh.device_type)
    own = distribute_tensor(places, mesh, placements, src_data_rank=None).to_local()
    if not len(own):
        return ()
    starts = [0, *(torch.nonzero(own.diff() != 1).flatten() + 1).tolist(), len(own)]
    return tuple((int(own[start]), start, end - start) for start, end in pairwise(starts))
