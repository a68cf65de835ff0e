"""Directories of safetensors files: read tensor by tensor, written tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zoo.spec.base import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_OURS = ("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors")
_MAX_JSON_BYTES = 64 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Storage types that hold weights as they are; others belong to quantized checkpoints."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may come from anywhere.

    Raises:
        ConfigError: it is missing, too large, or no JSON object.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ConfigError(f"{path}: larger than {_MAX_JSON_BYTES >> 20} MiB; not read")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not sound JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found {type(data).__name__}; must be an object")
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


class StoredTensors:
    """The tensors of a checkpoint directory. Opening it reads the headers alone."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            ConfigError: no safetensors files, or unsound ones.
        """
        self._places: dict[str, tuple[Path, int]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path, wanted in _files_of(directory).items():
            header, start = _header(path)
            names = header.keys() if wanted is None else wanted
            if missing := sorted(names - header.keys()):
                raise ConfigError(f"{path}: {INDEX} says it holds {_some(missing)}; it does not")
            for name in names:
                dtype = header[name]["dtype"]
                if dtype not in DTYPES:
                    advice = f"understood: {', '.join(DTYPES)}; dequantize the checkpoint first"
                    raise ConfigError(f"{path}: {name}: found dtype {dtype}; {advice}")
                self.shapes[name] = tuple(header[name]["shape"])
                self.dtypes[name] = DTYPES[dtype]
                self._places[name] = path, start + header[name]["data_offsets"][0]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. It is read, not mapped: pages of a mapped file would pile up in memory."""
        path, start = self._places[name]
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        with path.open("rb") as file:
            file.seek(start)
            if file.readinto(_bytes_of(tensor)) != tensor.nbytes:
                raise ConfigError(f"{path}: {name}: the file ends too early; it changed while it was read")
        return tensor


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What a file says of each of its tensors, and where their bytes start. The library proves it sound first."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a sound safetensors file: {error}") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU as a flat array of bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _files_of(directory: Path) -> Mapping[Path, set[str] | None]:
    """The files of a checkpoint, with the names that each is to give; None: all of them."""
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, Mapping) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ConfigError(f"{directory / INDEX}: weight_map must name a file for each tensor")
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ConfigError(f"{directory / INDEX}: {file!r}: must be a .safetensors file beside the index")
            files.setdefault(directory / file, set()).add(name)
        return files
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: None}
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickled:
        raise pickled_error(directory, pickled)
    raise ConfigError(f"{directory}: holds neither {SINGLE} nor {INDEX}")


def pickled_error(directory: Path, names: list[str]) -> ConfigError:
    """The refusal of weights that are pickled."""
    return ConfigError(
        f"{directory}: found {_some(names)}; pickled weights can run code and are not read. Where you trust "
        "them, convert them once: transformers.AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path)"
    )


Entry = tuple[str, torch.dtype, tuple[int, ...], Callable[[], Tensor]]
"""A tensor to write: name, dtype, shape, and what makes it when its turn comes."""


def write_tensors(directory: Path, entries: Iterable[Entry], max_shard_bytes: int) -> None:
    """Write tensors as one safetensors file, or as several with an index.

    One tensor at a time is in memory beside the model. Files appear under their names when all are whole; older
    weights of the same naming are then removed.
    """
    shards = _shards(entries, max_shard_bytes)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    for name, shard in zip(names, shards, strict=True):
        with (directory / f"{name}.partial").open("wb") as file:
            _write_file(file, shard)
    if count > 1:
        weight_map = {entry[0]: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(_num_bytes(entry) for shard in shards for entry in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / f"{INDEX}.partial").write_text(json.dumps(index, indent=2), encoding="utf-8")
        names.append(INDEX)
    for name in names:
        os.replace(directory / f"{name}.partial", directory / name)
    for path in [path for pattern in _OURS for path in directory.glob(pattern)]:
        if path.name not in names:
            path.unlink()


def _shards(entries: Iterable[Entry], max_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + _num_bytes(entry) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += _num_bytes(entry)
    return shards


def _num_bytes(entry: Entry) -> int:
    return torch.Size(entry[2]).numel() * entry[1].itemsize


def _write_file(file: BinaryIO, shard: list[Entry]) -> None:
    """The format: the header's length (8 bytes, little endian), the header as JSON, the tensors' bytes in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in shard:
        name, dtype, shape, _ = entry
        start, end = end, end + _num_bytes(entry)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for *_, make in shard:
        _bytes_of(make().detach().to("cpu").contiguous()).tofile(file)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
