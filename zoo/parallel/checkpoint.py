"""Save and load the parts of a model that many processes hold, by torch.distributed.checkpoint.

A checkpoint that one layout has written is read by any other, and by a single process: tensors have the names and the
whole shapes that they have without any layout. torch plans who writes and who reads what; the files are those of
`zoo.parallel.storage`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_pieces
from torch.distributed.checkpoint.state_dict_saver import save as save_pieces
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from zoo.parallel.pieces import Known, Pieces
from zoo.parallel.storage import Entry, Place, Reader, write_index, write_pieces
from zoo.spec.base import ConfigError

Group = dist.ProcessGroup | None
Finish = Callable[[Mapping[str, int]], None]
"""Takes the CRC-32 sums of the processes' files by their names."""
_MANY = 5
"""Faults that are named before the rest is left unsaid."""


def pieces_of(model: nn.Module, optimizers: Iterable[optim.Optimizer]) -> dict[str, Pieces]:
    """What this process holds: parameters and buffers by their names, and the optimizers' states as NAME/KEY."""
    tensors: dict[str, Tensor] = dict(model.state_dict())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{name}/{key}"] = torch.as_tensor(value)
    known: Known = {}
    return {name: Pieces(tensor, known) for name, tensor in tensors.items()}


def save(directory: Path, pieces: Mapping[str, Pieces], finish: Finish | None = None, group: Group = None) -> None:
    """Write what all processes hold into `directory`, which is there. Every process has to call it.

    Args:
        finish: Called on rank 0 when all of it is on disk; it fails on all processes when it fails there.
        group: Of all processes, for messages on the host; None: the default group.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is as good as many
        writing = _SavePlanner(flatten_state_dict=False)
        save_pieces(dict(pieces), planner=writing, storage_writer=_Writer(directory, finish), process_group=group)


def load(
    directory: Path,
    model: nn.Module,
    optimizers: Iterable[optim.Optimizer],
    group: Group = None,
    *,
    alone: bool = False,
    whole: bool = True,
) -> None:
    """Fill a model and its optimizers, spread in any way or not at all. Every process has to call it.

    Args:
        group: As in `save`.
        alone: This process alone calls it, for a model that it has whole.
        whole: False: this process has but some layers of the model.

    Raises:
        ConfigError: tensors are missing, left over or of another shape.
    """
    reader = _Reader(directory)
    optimizers = list(optimizers)
    _make_states(reader.files.index, optimizers)
    pieces = pieces_of(model, optimizers)
    _check(reader.files.index, pieces, directory, whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reading = _LoadPlanner(flatten_state_dict=False)
        load_pieces(dict(pieces), planner=reading, storage_reader=reader, process_group=group, no_dist=alone)


def _make_states(index: Mapping[str, Entry], optimizers: Iterable[optim.Optimizer]) -> None:
    """Give optimizers that have done no step the states that a checkpoint holds."""
    keys: dict[str, list[str]] = {}
    for full_key in index:
        name, slash, key = full_key.rpartition("/")
        if slash:
            keys.setdefault(name, []).append(key)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                for key in keys.get(name, ()):
                    entry = index[f"{name}/{key}"]
                    whole = entry.shape == tuple(parameter.shape)
                    optimizer.state[parameter][key] = (
                        torch.zeros_like(parameter, dtype=entry.dtype, requires_grad=False)
                        if whole
                        else torch.zeros(
                            entry.shape, dtype=entry.dtype, device=_device_of_counter(optimizer, parameter)
                        )
                    )


def _device_of_counter(optimizer: optim.Optimizer, parameter: Tensor) -> torch.device:
    """Where an optimizer keeps how many steps it has done."""
    fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return parameter.device if fused else torch.device("cpu")


def _check(index: Mapping[str, Entry], pieces: Mapping[str, Pieces], directory: Path, whole: bool) -> None:
    """Hold names and shapes against each other."""
    faults = []
    for name, piece in pieces.items():
        found = index.get(name)
        if found is None:
            faults.append(f"{name}: missing")
        elif found.shape != tuple(piece.shape):
            what = "experts" if ".experts." in name and found.shape[1:] == tuple(piece.shape)[1:] else ""
            counts = f"; {found.shape[0]} {what} there, {piece.shape[0]} here" if what else ""
            faults.append(f"{name}: found shape {list(found.shape)}, the model asks for {list(piece.shape)}{counts}")
    if whole:
        faults += [f"{name}: the model has no place for it" for name in index if "/" not in name and name not in pieces]
    if faults:
        more = f"\n  and {len(faults) - _MANY} more" if len(faults) > _MANY else ""
        listed = "".join(f"\n  {fault}" for fault in faults[:_MANY])
        raise ConfigError(f"{directory}: does not fit the model:{listed}{more}")


class _SavePlanner(DefaultSavePlanner):
    """Finds parts in `Pieces`, which are no tensors."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class _LoadPlanner(DefaultLoadPlanner):
    """Finds parts in `Pieces`, which are no tensors."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        part: Tensor = self.state_dict[index.fqn].__get_tensor_shard__(index)
        return part


class _Writer(StorageWriter):
    """One file for each process, then the index."""

    def __init__(self, directory: Path, finish: Finish | None) -> None:
        self.directory = directory
        self._finish = finish
        self._rank = 0

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = kwargs.get("rank", 0)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        named, indices = [], []
        for item in plan.items:
            piece = planner.resolve_data(item)
            assert isinstance(piece, Tensor)
            assert item.index.offset is not None
            named.append((f"{item.index.fqn}@{','.join(map(str, item.index.offset))}", piece))
            indices.append(item.index)
        results = []
        if named:
            file = f"rank_{self._rank:05d}.safetensors"
            starts, crc = write_pieces(self.directory / file, named)
            for index, (_, piece), start in zip(indices, named, starts, strict=True):
                place = Place(tuple(index.offset or ()), tuple(piece.shape), file, start)
                results.append(WriteResult(index, piece.nbytes, (piece.dtype, place, crc)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        index: dict[str, Entry] = {}
        sums: dict[str, int] = {}
        for written in (result for each in results for result in each):
            dtype, place, sums[place.file] = written.storage_data
            name = written.index.fqn
            stored = metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            known = index.get(name) or Entry(dtype, tuple(stored.size), ())
            index[name] = Entry(dtype, known.shape, (*known.places, place))
        write_index(self.directory, dict(sorted(index.items())))
        if self._finish is not None:
            self._finish(sums)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def storage_meta(self) -> StorageMeta | None:
        return None


class _Reader(StorageReader):
    """Boxes of the tensors of a checkpoint."""

    def __init__(self, directory: Path) -> None:
        self.files = Reader(directory)

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=entry.dtype),
                    torch.Size(entry.shape),
                    [
                        ChunkStorageMetadata(torch.Size(place.offsets), torch.Size(place.shape))
                        for place in entry.places
                    ],
                )
                for name, entry in self.files.index.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        places = {
            MetadataIndex(name, place.offsets): place
            for name, entry in self.files.index.items()
            for place in entry.places
        }
        with self.files:
            for item in plan.items:
                piece = self.files.piece(item.storage_index.fqn, places[item.storage_index])
                for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    piece = piece.narrow(axis, start, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(piece)
                planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
