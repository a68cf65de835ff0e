"""Models from directories of Hugging Face checkpoints, and back. Both ways go tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.decoder import Decoder, build
from zoo.hf.config import family_of, spec_from_hf, spec_to_hf
from zoo.hf.family import Family
from zoo.hf.tensors import Entry, StoredTensors, read_json, write_tensors
from zoo.hf.weights import Stored, stored_tensors
from zoo.spec.base import ConfigError

CONFIG = "config.json"


def from_pretrained(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    mtp: bool = False,
) -> Decoder:
    """The model of a directory that holds config.json and safetensors files.

    Beside the model, a few tensors are in memory at a time.

    Args:
        dtype: of the weights; None: each as it is stored.
        mtp: build and read the blocks of multi-token prediction too.

    Returns:
        The model, in evaluation mode.

    Raises:
        ConfigError: the config is not understood; tensors are missing, left over, of another shape or quantized; the
            weights are pickled.
    """
    directory = _directory(path)
    config = read_json(directory / CONFIG)
    spec, family = spec_from_hf(config), family_of(config)
    if mtp:
        if spec.mtp is None:
            raise ConfigError(f"{directory}: mtp: {CONFIG} describes no blocks of multi-token prediction; leave it out")
        spec = spec.replace(mtp=spec.mtp.replace(enabled=True))
    tensors = StoredTensors(directory)
    asked, held = spec.params().total, sum(math.prod(shape) for shape in tensors.shapes.values())
    if asked > 16 * held:  # an absurd config: no use building it to name what is missing
        raise ConfigError(f"{directory}: {CONFIG} describes {asked:,} parameters, the files hold {held:,}")
    plan = _matched(family, build(spec, "meta"), tensors, directory)
    dtypes = {stored.zoo: tensors.dtypes[stored.name] for stored in plan}
    model = build(spec, device, dtype or Counter(dtypes.values()).most_common(1)[0][0], init=False)
    if dtype is None:
        _take_dtypes(model, dtypes)
    targets = model.state_dict()
    with torch.no_grad():
        for name, parts in groupby(plan, lambda stored: stored.name):
            tensor = tensors.read(name)
            for stored in parts:
                stored.view(targets[stored.zoo]).copy_(stored.part(tensor) if stored.part else tensor)
    return model.eval()


def save_pretrained(model: Decoder, path: str | os.PathLike[str], max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a model as a directory that transformers opens: config.json and safetensors files in the hub's layout.

    Beside the model, one tensor is in memory at a time. A directory that is there keeps its other files.

    Args:
        max_shard_bytes: the largest file, unless one tensor is larger.

    Raises:
        ConfigError: no Hugging Face family expresses the model.
    """
    config = spec_to_hf(model.spec)
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    parameters = model.state_dict()
    family, shapes = family_of(config), {name: tuple(value.shape) for name, value in parameters.items()}
    plan = stored_tensors(family.weights, shapes, homes=family.homes(model.spec))
    entries: list[Entry] = []
    for name, group in groupby(plan, lambda stored: stored.name):
        parts = list(group)
        entries.append((name, parameters[parts[0].zoo].dtype, parts[0].shape, partial(_stored, parts, parameters)))
    write_tensors(directory, entries, max_shard_bytes)
    config["torch_dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _stored(parts: Sequence[Stored], parameters: Mapping[str, Tensor]) -> Tensor:
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


def _directory(path: str | os.PathLike[str]) -> Path:
    directory = Path(path)
    if directory.is_file():
        raise ConfigError(f"{directory}: is a file; give the directory with {CONFIG} and the safetensors files")
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory; download a model of the hub first: hf download {path}")
    return directory


def _matched(family: Family, model: Decoder, tensors: StoredTensors, directory: Path) -> list[Stored]:
    """The stored tensors that fill the model, after holding all names and shapes against each other."""
    parameters = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    plan: list[Stored] = []
    faults: list[str] = []
    for stored in stored_tensors(family.weights, parameters, tensors.shapes.__contains__, family.homes(model.spec)):
        found = tensors.shapes.get(stored.name)
        if found is None:
            faults.append(f"{stored.name}: missing ({stored.zoo})")
        elif found != stored.shape:
            faults.append(f"{stored.name}: found shape {list(found)}, the config asks for {list(stored.shape)}")
        else:
            plan.append(stored)
        if len(faults) >= _MANY:
            break
    ignored = family.left_out(model.spec)
    left = tensors.shapes.keys() - {stored.name for stored in plan} if not faults else set()
    for name in sorted(left):
        if not any(re.fullmatch(pattern, name) for pattern in ignored):
            faults += _left_over(name, family, tensors)
    if faults:
        more = "\n  ..." if len(faults) > _MANY - 1 else ""
        raise ConfigError(f"{directory}: weights and {CONFIG} do not fit:\n  " + "\n  ".join(faults[:_MANY]) + more)
    return plan


_MANY = 10
"""Faults that are named before the rest is left unsaid."""


def _left_over(name: str, family: Family, tensors: StoredTensors) -> list[str]:
    """What is wrong about a stored tensor that no parameter takes."""
    head, embedding = family.tied_head
    if name != head:
        return [f"{name}: the model has no place for it"]
    if torch.equal(tensors.read(head), tensors.read(embedding)):
        return []
    return [f"{name}: differs from the embedding, to which {CONFIG} ties it; keep it by tie_word_embeddings: false"]


def _take_dtypes(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give each parameter and buffer the dtype that it is stored in."""
    for name, parameter in list(model.named_parameters()):
        if parameter.dtype != dtypes[name]:
            owner = model.get_submodule(name.rpartition(".")[0])
            empty = torch.empty_like(parameter, dtype=dtypes[name], device=parameter.device)
            owner.register_parameter(name.rpartition(".")[2], nn.Parameter(empty))
    for name, buffer in list(model.named_buffers()):
        if buffer.dtype != dtypes.get(name, buffer.dtype):
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.register_buffer(name.rpartition(".")[2], torch.empty_like(buffer, dtype=dtypes[name]))
