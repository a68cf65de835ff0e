"""Models from checkpoints, and back to directories of Hugging Face checkpoints. Both ways go tensor by tensor."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zoo.decoder import Decoder, build
from zoo.hf.config import family_of, spec_to_hf
from zoo.hf.homes import stored_tensors
from zoo.hf.source import CONFIG, Source, dtypes_of, open_checkpoint
from zoo.hf.tensors import Entry, write_tensors
from zoo.hf.weights import Shape, Stored
from zoo.spec.model import ModelSpec

MAX_SHARD_BYTES = 5 * 10**9


def from_pretrained(
    path: str | os.PathLike[str] | Source,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    spec: ModelSpec | None = None,
) -> Decoder:
    """The model of a checkpoint: a directory that holds config.json and safetensors files, a GGUF file (the package
    gguf dequantizes it), or a directory of a run of zoo.

    Beside the model, a few tensors are in memory at a time.

    Args:
        path: the checkpoint, or one that is open.
        dtype: of the weights; None: each as it is stored, those of GGUF files in fp32.
        spec: a description to build in place of the checkpoint's, for the same weights with an option switched, or with
            the blocks of multi-token prediction enabled.

    Returns:
        The model, in evaluation mode.

    Raises:
        ConfigError: the config is not understood; tensors are missing, left over, of another shape or quantized; the
            weights are pickled.
    """
    source = path if isinstance(path, Source) else open_checkpoint(path)
    spec = spec or source.spec
    plan = source.plan(spec)
    dtypes = dtypes_of(plan, source.tensors)
    model = build(spec, device, dtype or Counter(dtypes.values()).most_common(1)[0][0], init=False)
    if dtype is None:
        _take_dtypes(model, dtypes)
    targets = model.state_dict()
    with torch.no_grad():
        for name, parts in groupby(plan, lambda stored: stored.name):
            tensor = source.tensors.read(name)
            for stored in parts:
                stored.view(targets[stored.zoo]).copy_(stored.part(tensor) if stored.part else tensor)
    return model.eval()


def save_pretrained(model: Decoder, path: str | os.PathLike[str], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a model as a directory that transformers opens: config.json and safetensors files in the hub's layout.

    Beside the model, one tensor is in memory at a time. A directory that is there keeps its other files.

    Args:
        max_shard_bytes: the largest file, unless one tensor is larger.

    Raises:
        ConfigError: no Hugging Face family expresses the model.
    """
    config = spec_to_hf(model.spec)
    parameters = model.state_dict()
    entries = hub_entries(
        config,
        model.spec,
        {name: tuple(value.shape) for name, value in parameters.items()},
        {name: value.dtype for name, value in parameters.items()},
        lambda parts: assembled(parts, parameters),
    )
    config["torch_dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    write_checkpoint(Path(path), config, entries, max_shard_bytes)


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], entries: Sequence[Entry], max_shard_bytes: int
) -> None:
    """Write the tensors, then the config.json, of a Hugging Face checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory, entries, max_shard_bytes)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def hub_entries(
    config: Mapping[str, Any],
    spec: ModelSpec,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, torch.dtype],
    make: Callable[[Sequence[Stored]], Tensor],
) -> list[Entry]:
    """The tensors of a checkpoint in the hub's layout.

    Args:
        config: its config.json.
        shapes: of the parameters, by their names in the model.
        dtypes: of the parameters.
        make: the stored tensor that consists of these parts.
    """
    family = family_of(config)
    plan = stored_tensors(family.weights, shapes, homes=family.homes(spec))
    entries: list[Entry] = []
    for name, group in groupby(plan, lambda stored: stored.name):
        parts = list(group)
        entries.append((name, dtypes[parts[0].zoo], parts[0].shape, partial(make, parts)))
    return entries


class ByName(Protocol):
    """Parameters that are asked for by name."""

    def __getitem__(self, name: str, /) -> Tensor: ...


def assembled(parts: Sequence[Stored], parameters: ByName) -> Tensor:
    """A stored tensor, put together from the parameters that it holds."""
    first = parts[0]
    view = first.view(parameters[first.zoo])
    if first.part is None:
        return view
    tensor = torch.empty(first.shape, dtype=view.dtype, device=view.device)
    for stored in parts:
        assert stored.part is not None
        stored.part(tensor).copy_(stored.view(parameters[stored.zoo]))
    return tensor


def _take_dtypes(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give each parameter and buffer the dtype that it is stored in."""
    for name, parameter in list(model.named_parameters()):
        if parameter.dtype != dtypes[name]:
            owner = model.get_submodule(name.rpartition(".")[0])
            empty = torch.empty_like(parameter, dtype=dtypes[name], device=parameter.device)
            owner.register_parameter(
                name.rpartition(".")[2], nn.Parameter(empty, requires_grad=parameter.requires_grad)
            )
    for name, buffer in list(model.named_buffers()):
        if buffer.dtype != dtypes.get(name, buffer.dtype):
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.register_buffer(name.rpartition(".")[2], torch.empty_like(buffer, dtype=dtypes[name]))
