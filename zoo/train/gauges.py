"""What the watch reads from a model beside its loss: the size of the residual stream and of the updates."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

NUM_SAMPLES, SAMPLE = 8, 4096
"""Matrices, and elements of each, that stand for all weights: some 0.1 ms a step."""


class ResidualGauge:
    """The root mean square of what each layer of a decoder leaves in the residual stream, in training mode.

    It sees the first micro-batch of a step, and not what is computed again in the backward pass. With tokens or widths
    divided over processes it sees the part of this one.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._seen: dict[int, Tensor] = {}
        for index, layer in enumerate(layers):
            layer.register_forward_hook(partial(self._see, index))

    def read(self) -> tuple[float, ...]:
        """One number for each layer that was passed since the last reading."""
        seen = [self._seen[index] for index in sorted(self._seen)]
        self._seen.clear()
        return tuple(torch.stack(seen).tolist()) if seen else ()

    def _see(self, index: int, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if layer.training and index not in self._seen:
            local = local_part(output.detach())
            norm = torch.linalg.vector_norm(local, dtype=torch.promote_types(local.dtype, torch.float32))
            self._seen[index] = norm / max(1, local.numel()) ** 0.5


class UpdateGauge:
    """How far an optimizer step moves weights: the root mean square of the change over that of the weights."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        matrices = [parameter for parameter in parameters if parameter.requires_grad and parameter.ndim > 1]
        count = min(NUM_SAMPLES, len(matrices))
        self._chosen = [matrices[index * len(matrices) // count] for index in range(count)]
        self._before: list[Tensor] = []

    def before(self) -> None:
        """To be called right before the optimizers."""
        self._before = [sample.clone() for sample in self._samples()]

    def after(self) -> float:
        """To be called right after them: the median over the matrices; 0 when there are none."""
        if not self._before:
            return 0.0
        changes = torch._foreach_sub(self._samples(), self._before)
        moved, sizes = (torch.stack(cast(Any, torch._foreach_norm(parts))) for parts in (changes, self._before))
        self._before = []
        return float((moved / sizes.clamp_min(1e-12)).median())

    def _samples(self) -> list[Tensor]:
        flat = [local_part(parameter.detach()).flatten() for parameter in self._chosen]
        return [values[:: max(1, len(values) // SAMPLE)].to(torch.float32) for values in flat if len(values)]


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is divided over several."""
    to_local = getattr(tensor, "to_local", None)  # of a DTensor, whose import would take a second
    return tensor if to_local is None else to_local()
