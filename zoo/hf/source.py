"""Checkpoints on disk, whatever their layout: a Hugging Face directory, a GGUF file, a checkpoint of a run of zoo."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.decoder import Decoder, build
from zoo.hf.config import family_of, spec_from_hf
from zoo.hf.family import Family
from zoo.hf.gguf_file import MAGIC
from zoo.hf.homes import stored_tensors
from zoo.hf.tensors import StoredTensors, pickled_error, read_json
from zoo.hf.weights import Shape, Stored
from zoo.spec.base import ConfigError, decode
from zoo.spec.model import ModelSpec
from zoo.train.rundir import STATE, TENSORS, find_checkpoints, newest_checkpoint

CONFIG = "config.json"
RUN_CHECKPOINTS = "checkpoints"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MANY = 10
"""Faults that are named before the rest is left unsaid."""


class Tensors(Protocol):
    """Tensors by their stored names, read one at a time."""

    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""


class PiecedTensors:
    """The tensors of a checkpoint that several processes have written, each put together when it is asked for."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            ConfigError: the index is unsound.
        """
        from zoo.parallel.storage import Reader

        self._reader = Reader(directory)
        index = {name: entry for name, entry in self._reader.index.items() if "/" not in name}  # no optimizer states
        self.shapes: dict[str, Shape] = {name: entry.shape for name, entry in index.items()}
        self.dtypes = {name: entry.dtype for name, entry in index.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        with self._reader as reader:
            return reader.read(name)


@dataclass(frozen=True)
class Source:
    """An opened checkpoint. Opening reads headers and descriptions, no tensor."""

    path: Path
    """The directory or file that holds it."""
    layout: str
    """What it is, in words."""
    spec: ModelSpec
    tensors: Tensors
    family: Family | None
    """Whose table names the tensors; None: they have the model's own names."""
    config: Mapping[str, Any]
    """What describes it: config.json, its counterpart in a GGUF file, or the settings of a run."""
    described_by: str = CONFIG

    def plan(self, spec: ModelSpec | None = None) -> list[Stored]:
        """The stored tensors that fill the model, after holding all names and shapes against each other.

        Args:
            spec: a description of the same weights with other options; None: its own.

        Raises:
            ConfigError: tensors are missing, left over or of another shape.
        """
        spec = spec or self.spec
        asked, held = spec.params().total, sum(math.prod(shape) for shape in self.tensors.shapes.values())
        if asked > 16 * held:  # an absurd config: no use building it to name what is missing
            raise ConfigError(
                f"{self.path}: {self.described_by} describes {asked:,} parameters, the files hold {held:,}"
            )
        plan: list[Stored] = []
        faults: list[str] = []
        for stored in self._wanted(spec):
            found = self.tensors.shapes.get(stored.name)
            if found is None and self.family and _matches(stored.name, self.family.zeros):
                continue  # buffers of a new model are zero
            if found is None:
                faults.append(f"{stored.name}: missing ({stored.zoo})")
            elif found != stored.shape:
                asked_for = f"{self.described_by} asks for {list(stored.shape)}".replace(CONFIG, "the config")
                faults.append(f"{stored.name}: found shape {list(found)}, {asked_for}")
            else:
                plan.append(stored)
            if len(faults) >= _MANY:
                break
        if not faults:
            faults = list(self._left_over(spec, self.tensors.shapes.keys() - {stored.name for stored in plan}))
        if faults:
            more = "\n  ..." if len(faults) > _MANY - 1 else ""
            listed = "\n  ".join(faults[:_MANY])
            raise ConfigError(f"{self.path}: weights and {self.described_by} do not fit:\n  {listed}{more}")
        return plan

    def whole_spec(self) -> ModelSpec:
        """Its description, with the blocks of multi-token prediction enabled where the files hold them."""
        mtp = self.spec.mtp
        if mtp is None or mtp.enabled or self.family is None or self.family.mtp is None:
            return self.spec
        further = list(self.family.mtp.left_out(self.spec))
        held = any(_matches(name, further) for name in self.tensors.shapes)
        return self.spec.replace(mtp=mtp.replace(enabled=True)) if held else self.spec

    def _wanted(self, spec: ModelSpec) -> Iterator[Stored]:
        shapes = shapes_of(build(spec, "meta"))
        if self.family is None:
            return iter(own_names(shapes))
        known = self.tensors.shapes
        return stored_tensors(self.family.weights, shapes, known.__contains__, self.family.homes(spec, list(known)))

    def _left_over(self, spec: ModelSpec, names: Iterable[str]) -> Iterator[str]:
        """What is wrong about stored tensors that no parameter takes."""
        ignored = self.family.left_out(spec) if self.family else []
        head, embedding = self.family.tied_head if self.family else ("", "")
        for name in sorted(names):
            if _matches(name, ignored):
                continue
            if name != head:
                yield f"{name}: the model has no place for it"
            elif not torch.equal(self.tensors.read(head), self.tensors.read(embedding)):
                yield (
                    f"{name}: differs from the embedding, to which {self.described_by} ties it; "
                    "keep it by tie_word_embeddings: false"
                )


def open_checkpoint(path: str | os.PathLike[str]) -> Source:
    """The checkpoint that a path means: a Hugging Face directory, a GGUF file or a directory with one, a directory of a
    run of zoo (its newest checkpoint counts), or one checkpoint of a run.

    Raises:
        ConfigError: there is none, or it is pickled, unsound or not understood.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return _open_file(place)
    if not place.is_dir():
        raise ConfigError(f"{place}: no such directory; download a model of the hub first: hf download {path}")
    if (place / STATE).is_file():
        return _open_zoo(place)
    if (place / RUN_CHECKPOINTS).is_dir():
        return _open_zoo(newest_checkpoint(place).path)
    files = sorted(place.glob("*.gguf"))
    if files and not (place / CONFIG).is_file():
        if len(files) > 1:
            raise ConfigError(f"{place}: holds {len(files)} GGUF files; name one of them, such as {files[0]}")
        return _open_file(files[0])
    config = read_json(place / CONFIG)
    family = family_of(config)
    layout = f"Hugging Face checkpoint ({family.model_type})"
    return Source(place, layout, spec_from_hf(config), StoredTensors(place), family, config)


def _open_file(path: Path) -> Source:
    if path.suffix in PICKLED:
        raise pickled_error(path.parent, [path.name])
    if path.suffix != ".gguf" and not _begins(path, MAGIC):
        raise ConfigError(f"{path}: is a file; give the directory with {CONFIG} and the safetensors files")
    from zoo.hf.gguf import open_gguf

    config, spec, family, tensors = open_gguf(path)
    layout = f"GGUF file ({family.model_type})"
    return Source(path, layout, spec, tensors, family, config, described_by="its metadata")


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _open_zoo(directory: Path) -> Source:
    if directory.parent.name == RUN_CHECKPOINTS:
        complete, notes = find_checkpoints(directory.parent.parent)
        if directory.name not in {checkpoint.path.name for checkpoint in complete}:
            raise ConfigError(f"{directory}: is no complete checkpoint; {'; '.join(notes)}")
    settings = read_json(directory / STATE).get("settings")
    if not isinstance(settings, Mapping) or "model" not in settings:
        raise ConfigError(f"{directory / STATE}: settings.model is missing; it describes the weights")
    spec = decode(ModelSpec, settings["model"], "settings.model")
    tensors: Tensors = PiecedTensors(directory) if (directory / TENSORS).is_file() else StoredTensors(directory)
    start = settings.get("finetune")
    if not isinstance(start, Mapping) or start.get("type") != "lora":
        return Source(directory, "zoo checkpoint", spec, tensors, None, settings, STATE)
    from zoo.adapt.merged import on_base

    tensors = on_base(settings, tensors)
    return Source(directory, f"adapters on {start.get('path')}", spec, tensors, None, settings, STATE)


def shapes_of(model: Decoder) -> dict[str, Shape]:
    """The shapes of all parameters, and of the buffers that are saved."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def own_names(shapes: Mapping[str, Shape]) -> list[Stored]:
    """Parameters that are stored under their names in the model, as they are."""
    return [Stored(name, shape, name, _as_it_is) for name, shape in shapes.items()]


def _as_it_is(parameter: Tensor) -> Tensor:
    return parameter


def dtypes_of(plan: Iterable[Stored], tensors: Tensors) -> dict[str, torch.dtype]:
    """What each parameter is stored in; where its parts differ, what holds all of them."""
    dtypes: dict[str, torch.dtype] = {}
    for stored in plan:
        dtype = tensors.dtypes[stored.name]
        dtypes[stored.zoo] = torch.promote_types(dtype, dtypes.get(stored.zoo, dtype))
    return dtypes


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
