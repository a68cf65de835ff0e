"""What attention remembers while it generates."""

from __future__ import annotations

import torch
from torch import Tensor


class GrowingCache:
    """Tensors [b, s, ...] of earlier tokens, in buffers made once. With a `window`, only those still in sight are kept.

    Args:
        max_len: most tokens that will ever be appended.
        window: keys that a query sees, itself included; None: all.
    """

    def __init__(
        self, batch_size: int, max_len: int, window: int | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._batch_size = batch_size
        self._capacity = max_len if window is None else min(max_len, window - 1)
        self._windowed = window is not None and window - 1 < max_len
        self._device, self._dtype = device, dtype
        self._buffers: list[Tensor] = []
        self.length = 0
        """Tokens held."""

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Remember the tokens of a pass, new [b, s, ...]; the earlier ones that may still be seen, then these."""
        if not self._buffers:
            shapes = [(self._batch_size, self._capacity, *tensor.shape[2:]) for tensor in new]
            self._buffers = [torch.empty(shape, device=self._device, dtype=self._dtype) for shape in shapes]
        if self._windowed:
            return self._append_windowed(new)
        start, self.length = self.length, self.length + new[0].shape[1]
        if self.length > self._capacity:
            raise ValueError(f"the cache holds {self._capacity} tokens, {self.length} were appended")
        for buffer, tensor in zip(self._buffers, new, strict=True):
            buffer[:, start : self.length] = tensor
        return tuple(buffer[:, : self.length] for buffer in self._buffers)

    def _append_windowed(self, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        held = [buffer[:, : self.length] for buffer in self._buffers]
        joined = tuple(torch.cat((old, tensor.to(self._dtype)), 1) for old, tensor in zip(held, new, strict=True))
        self.length = min(self._capacity, joined[0].shape[1])
        for buffer, tensor in zip(self._buffers, joined, strict=True):
            buffer[:, : self.length] = tensor[:, tensor.shape[1] - self.length :]
        return joined

    def select(self, rows: Tensor) -> None:
        """Keep the rows of the batch that `rows` [b'] int64 names, in that order."""
        self._batch_size = len(rows)
        self._buffers = [buffer[rows] for buffer in self._buffers]
