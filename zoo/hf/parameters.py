"""The parameters of a checkpoint, one at a time, without a model around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from zoo.decoder import build
from zoo.hf.source import Source, dtypes_of, shapes_of
from zoo.hf.weights import Shape, Stored
from zoo.spec.base import ConfigError
from zoo.spec.model import ModelSpec


class Parameters(Protocol):
    """The parameters of a model by name, and the buffers that are saved, each made when it is asked for."""

    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]

    def __getitem__(self, name: str, /) -> Tensor: ...


class StoredParameters(Mapping[str, Tensor]):
    """The parameters that a checkpoint holds. The newest parameter and the newest stored tensor stay in memory."""

    def __init__(self, source: Source, spec: ModelSpec) -> None:
        """
        Args:
            spec: of a model that the checkpoint's tensors fill.

        Raises:
            ConfigError: the tensors do not fill it.
        """
        self.source, self.plan = source, source.plan(spec)
        model = build(spec, "meta")
        self.shapes = shapes_of(model)
        stored = dtypes_of(self.plan, source.tensors)
        self.dtypes = {name: stored.get(name, value.dtype) for name, value in model.state_dict().items()}
        self._parts: dict[str, list[Stored]] = {}
        self._by_name: dict[str, list[Stored]] = {}
        for part in self.plan:
            self._parts.setdefault(part.zoo, []).append(part)
            self._by_name.setdefault(part.name, []).append(part)
        self._newest: tuple[str, Tensor] | None = None
        self._newest_stored: tuple[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        if self._newest is None or self._newest[0] != name:
            self._newest = None  # let go before the next is made
            self._newest = name, self._put_together(name)
        return self._newest[1]

    def stored_alike(self, parts: Sequence[Stored]) -> bool:
        """Whether a tensor of another checkpoint of the same family is stored here under the same name."""
        ours = self._by_name.get(parts[0].name, [])
        return [(part.zoo, part.shape) for part in parts] == [(part.zoo, part.shape) for part in ours]

    def _put_together(self, name: str) -> Tensor:
        parts = self._parts.get(name, [])
        # A buffer that a checkpoint may lack is zero.
        made = (torch.empty if parts else torch.zeros)(self.shapes[name], dtype=self.dtypes[name])
        for stored in parts:
            tensor = self._read(stored.name)
            stored.view(made).copy_(stored.part(tensor) if stored.part else tensor)
        return made

    def _read(self, name: str) -> Tensor:
        if self._newest_stored is None or self._newest_stored[0] != name:
            self._newest_stored = None
            self._newest_stored = name, self.source.tensors.read(name)
        return self._newest_stored[1]


class Cast(Mapping[str, Tensor]):
    """Parameters in another dtype, the newest of which stays in memory: it may be written in many parts."""

    def __init__(self, inner: Parameters, dtype: torch.dtype | None, spec: ModelSpec) -> None:
        """
        Args:
            dtype: of parameters; buffers keep theirs, they hold what must stay exact. None: all do.
        """
        self._inner, self.shapes = inner, inner.shapes
        self._newest: tuple[str, Tensor] | None = None
        cast = {name for name, _ in build(spec, "meta").named_parameters()} if dtype is not None else set()
        self.dtypes = {name: dtype if dtype and name in cast else kept for name, kept in inner.dtypes.items()}

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        if self._newest is None or self._newest[0] != name:
            self._newest = None
            self._newest = name, in_dtype(name, self._inner[name], self.dtypes[name])
        return self._newest[1]


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype.

    Raises:
        ConfigError: finite values of it become infinite there.
    """
    cast = tensor.to(dtype)
    if cast is not tensor and bool((cast.isinf() & tensor.isfinite()).any()):
        raise ConfigError(f"{name}: holds values up to {tensor.abs().max():.4g}, too large for {dtype}; use dtype=bf16")
    return cast
