"""What attention remembers while it generates."""

from __future__ import annotations

import torch
from torch import Tensor

_SPARE_SLOTS = 64
"""Least room beyond a window: the more, the less often its tokens move."""


class GrowingCache:
    """Tensors [b, s, ...] of earlier tokens, in buffers made once. With a `window`, older ones make room for new ones.

    Args:
        max_len: most tokens that will ever be appended.
        window: keys that a query sees, itself included; None: all.
    """

    def __init__(
        self, batch_size: int, max_len: int, window: int | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._batch_size = batch_size
        self._kept = None if window is None else window - 1
        room = max_len if window is None else window - 1 + max(_SPARE_SLOTS, window // 4)
        self.capacity = min(max_len, room)
        """Slots of the buffers."""
        self._device, self._dtype = device, dtype
        self.buffers: list[Tensor] = []
        """One [b, capacity, ...] for each of the tensors that are appended together."""
        self.length = 0
        """Slots in use, from the first one on."""

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Remember the tokens of a pass, new [b, s, ...]; the earlier ones that may still be seen, then these.

        The results are views that the next call may change.
        """
        if not self.buffers:
            shapes = [(self._batch_size, self.capacity, *tensor.shape[2:]) for tensor in new]
            self.buffers = [torch.empty(shape, device=self._device, dtype=self._dtype) for shape in shapes]
        seq_len, kept = new[0].shape[1], self._kept
        if kept is not None and min(self.length, kept) + seq_len > self.capacity:
            return self._append_long(new, kept)
        start = self.advance(seq_len)
        first = 0 if kept is None else max(0, start - kept)
        for buffer, tensor in zip(self.buffers, new, strict=True):
            buffer[:, start : self.length] = tensor
        return tuple(buffer[:, first : self.length] for buffer in self.buffers)

    def advance(self, seq_len: int) -> int:
        """The first of `seq_len` slots that the caller fills with the next tokens; they count as remembered."""
        if self.length + seq_len > self.capacity:
            if self._kept is None:
                raise ValueError(f"the cache holds {self.capacity} tokens, {self.length + seq_len} were appended")
            kept = min(self.length, self._kept)
            for buffer in self.buffers:
                buffer[:, :kept] = buffer[:, self.length - kept : self.length].clone()
            self.length = kept
        start, self.length = self.length, self.length + seq_len
        return start

    def _append_long(self, new: tuple[Tensor, ...], kept: int) -> tuple[Tensor, ...]:
        """More tokens than there is room for: only the last ones are kept."""
        held = [buffer[:, max(0, self.length - kept) : self.length] for buffer in self.buffers]
        joined = tuple(torch.cat((old, tensor.to(self._dtype)), 1) for old, tensor in zip(held, new, strict=True))
        self.length = min(kept, joined[0].shape[1])
        for buffer, tensor in zip(self.buffers, joined, strict=True):
            buffer[:, : self.length] = tensor[:, tensor.shape[1] - self.length :]
        return joined

    def select(self, rows: Tensor) -> None:
        """Keep the rows of the batch that `rows` [b'] int64 names, in that order."""
        self._batch_size = len(rows)
        self.buffers = [buffer[rows] for buffer in self.buffers]
