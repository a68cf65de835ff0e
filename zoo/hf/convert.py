"""From any checkpoint that zoo reads to a directory of its own, tensor by tensor, with proof of what was written."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.decoder import build
from zoo.hf.checkpoint import MAX_SHARD_BYTES, assembled, from_pretrained, hub_entries
from zoo.hf.config import family_of, spec_to_hf
from zoo.hf.family import differences
from zoo.hf.parameters import Cast, Parameters, StoredParameters, in_dtype
from zoo.hf.source import CONFIG, Source, open_checkpoint, own_names
from zoo.hf.tensors import INDEX, Entry, write_tensors
from zoo.hf.tokenizer import TOKEN_IDS, TOKENIZER_FILES, write_tokenizer
from zoo.hf.weights import Stored
from zoo.spec.base import ConfigError
from zoo.spec.model import ModelSpec
from zoo.train.rundir import FORMAT, STATE

Change = Callable[[ModelSpec, StoredParameters], tuple[ModelSpec, Parameters]]
LOGITS_UP_TO = 500_000_000
"""Parameters of the largest model that is built twice, to hold its logits against the source's."""
LOGITS_TOLERANCE = 1e-4
"""In standard deviations of the logits, in fp32."""


@dataclass(frozen=True)
class Converted:
    """What was written, and what was found when it was read again."""

    source: Source
    spec: ModelSpec
    dest: Path
    num_tensors: int
    """Written tensors, each of which was held against the source bit by bit."""
    num_bytes: int
    dtypes: tuple[str, ...]
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    """Tensors of the source that are no weights of the model, or repeat others."""
    logits_difference: float | None
    """Between source and result, in standard deviations; None: the model is too large to be built for it."""
    notes: tuple[str, ...]


def convert(
    path: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    to: Literal["hf", "zoo"] = "hf",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    change: Change | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Converted:
    """Write a checkpoint anew, then read it back and hold every tensor against the source.

    A few tensors are in memory at a time, but for the comparison of logits. `dest` appears when all is proven.

    Args:
        path: whatever `open_checkpoint` takes.
        dest: the directory.
        to: the layout of the hub, or zoo's own, which holds models that no Hugging Face family expresses.
        dtype: of the parameters; None: as they are stored.
        overwrite: replace a checkpoint in `dest`; its other files stay.
        change: makes another model of the source that computes the same.
        max_shard_bytes: the largest file, unless one tensor is larger.

    Raises:
        ConfigError: the source cannot be read, `dest` is not free, no family expresses the model, or what was written
            is not what was read.
    """
    source, final = open_checkpoint(path), Path(dest).expanduser().absolute()
    _check_free(source.path.absolute(), final, overwrite)
    whole = source.whole_spec()
    stored = StoredParameters(source, whole)
    spec, parameters = change(whole, stored) if change else (whole, stored)
    description = _description(source, spec, to, changed=change is not None)
    parameters = Cast(parameters, dtype, spec)
    # Of the same family, a stored tensor is what it was, however many of them a parameter consists of.
    alike = change is None and to == "hf" and family_of(description) is source.family
    make = partial(_made, parameters=parameters, alike=stored if alike else None)
    with _apart(final) as directory:
        _write(directory, description, spec, parameters, make, max_shard_bytes)
        notes = write_tokenizer(source, directory)
        num_tensors = _prove(directory, spec, parameters, make)
        logits = _logits_difference(directory, spec, whole, Cast(stored, dtype, whole))
        files = tuple(sorted(path.name for path in directory.iterdir()))
        num_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        _move(directory, final)
    left_out = tuple(sorted(source.tensors.shapes.keys() - {part.name for part in stored.plan}))
    dtypes = tuple(sorted({str(dtype).removeprefix("torch.") for dtype in parameters.dtypes.values()}))
    return Converted(source, spec, final, num_tensors, num_bytes, dtypes, files, left_out, logits, tuple(notes))


def _check_free(source: Path, dest: Path, overwrite: bool) -> None:
    if dest.exists() and not dest.is_dir():
        raise ConfigError(f"{dest}: is a file; name a directory to write")
    if dest.is_dir() and any(dest.iterdir()) and not overwrite:
        raise ConfigError(f"{dest}: is not empty; name another directory, or replace its checkpoint: overwrite=true")
    if dest.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConfigError(f"{dest}: holds the source; name another directory")


def _description(source: Source, spec: ModelSpec, to: str, changed: bool) -> dict[str, Any]:
    """What to write beside the weights: config.json, in the source's own words where they hold, or zoo's state.json."""
    config = source.config
    ids = {name: config[name] for name in TOKEN_IDS if config.get(name) is not None}
    if to == "zoo":
        own = {"tokenizer": config["tokenizer"]} if source.family is None and "tokenizer" in config else {}
        return {"format": FORMAT, "settings": {"model": spec.to_dict(), **own, **ids}}
    if source.described_by == CONFIG and not changed:
        return {name: value for name, value in config.items() if name != "dtype"}
    try:
        return {**(spec_to_hf(spec) if changed or source.family is None else family_of(config).write(spec)), **ids}
    except ConfigError as error:
        raise ConfigError(f"{error}\nto: found 'hf'; zoo's own layout holds every model: to=zoo") from None


def _made(parts: Sequence[Stored], parameters: Parameters, alike: StoredParameters | None) -> Tensor:
    """A stored tensor.

    Args:
        parts: the places in the model of what it holds.
        alike: a checkpoint that may hold it as it is.
    """
    name = parts[0].name
    if alike is not None and alike.stored_alike(parts):
        return in_dtype(name, alike.source.tensors.read(name), parameters.dtypes[parts[0].zoo])
    return assembled(parts, parameters)


def _write(
    directory: Path,
    description: dict[str, Any],
    spec: ModelSpec,
    parameters: Parameters,
    make: Callable[[Sequence[Stored]], Tensor],
    max_shard_bytes: int,
) -> None:
    if "settings" in description:
        parts = own_names(parameters.shapes)
        entries: list[Entry] = [(p.name, parameters.dtypes[p.name], p.shape, partial(make, [p])) for p in parts]
        name = STATE
    else:
        entries = hub_entries(description, spec, parameters.shapes, parameters.dtypes, make)
        name, dtype = CONFIG, str(parameters.dtypes["embed.weight"]).removeprefix("torch.")
        description["torch_dtype"] = dtype
    write_tensors(directory, entries, max_shard_bytes)
    (directory / name).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _prove(directory: Path, spec: ModelSpec, parameters: Parameters, make: Callable[[Sequence[Stored]], Tensor]) -> int:
    """Read everything again, as from anywhere, and hold it against what was to be written; the number of tensors.

    Raises:
        ConfigError: the description or a tensor differs, or a parameter is not wholly there.
    """
    written = open_checkpoint(directory)
    found = written.whole_spec()
    if faults := list(differences(spec, found)):
        raise ConfigError("what was written describes another model than the source:\n  " + "\n  ".join(faults))
    missing = {name: math.prod(shape) for name, shape in parameters.shapes.items()}
    for name, group in groupby(written.plan(found), lambda part: part.name):
        parts, tensor = list(group), written.tensors.read(name)
        if not _same_bits(tensor, make(parts)):
            raise ConfigError(f"{name}: what was written is not what the source holds; nothing is left of it")
        for part in parts:
            missing[part.zoo] -= (part.part(tensor) if part.part else tensor).numel()
    if lost := [name for name, elements in missing.items() if elements]:
        raise ConfigError(f"{lost[0]}: {missing[lost[0]]:,} of its elements were written nowhere")
    return len(written.tensors.shapes)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit: NaN equals itself, 0 is not -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return torch.equal(one.view(bits), other.view(bits))


def _logits_difference(directory: Path, spec: ModelSpec, before: ModelSpec, parameters: Parameters) -> float | None:
    """The largest difference of logits between source and result, in fp32 and standard deviations.

    Args:
        spec: of the result.
        before: of the source.
        parameters: of the source, in the dtype of the result.

    Raises:
        ConfigError: they differ by more than rounding.
    """
    if spec.params().total > LOGITS_UP_TO:
        return None
    reference = build(before, dtype=torch.float32, init=False).eval()
    with torch.no_grad():
        for name, target in reference.state_dict().items():
            target.copy_(parameters[name])
        tokens = torch.randint(spec.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
        expected = reference(tokens)
        del reference
        found = from_pretrained(directory, torch.float32)(tokens)
    difference = 0.0 if _same_bits(found, expected) else float((found - expected).abs().max() / expected.std())
    if not difference < LOGITS_TOLERANCE:
        raise ConfigError(
            f"what was written gives other logits than the source, by {difference:.3g} of their deviation"
        )
    return difference


@contextmanager
def _apart(final: Path) -> Iterator[Path]:
    """A directory beside `final` to write into, which is removed in the end."""
    directory = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        yield directory
    except OSError as error:
        raise ConfigError(f"{final}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _move(directory: Path, final: Path) -> None:
    """Put what was written in its place. A checkpoint that is there goes; other files stay."""
    final.mkdir(exist_ok=True)
    ours = {CONFIG, STATE, INDEX, *TOKENIZER_FILES}
    for path in final.iterdir():
        if path.name in ours or path.suffix == ".safetensors":
            path.unlink()
    for path in directory.iterdir():
        os.replace(path, final / path.name)
