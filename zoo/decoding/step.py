"""A model as a compiled step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from zoo.blocks.base import Context
from zoo.blocks.layer import Layer
from zoo.decoding.blocks import attention, ffn, knows_ffn, knows_mixer
from zoo.decoding.parts import add, norm, product
from zoo.decoding.steps import Steps, fit, readable
from zoo.native.library import library
from zoo.native.memory import use_huge_pages

if TYPE_CHECKING:
    from zoo.decoder import Decoder

MOST_ROWS = 16
"""Rows beyond which the products of the BLAS library are the faster ones."""


class CompiledStep:
    """`step(tokens, context)`: one further token of each row, tokens [b] int64, to logits [b, vocab] fp32.

    The weights are read where they are; small ones (norms, routers' biases) are copied when the step is made, so a step
    serves one text. The logits' memory is that of the next call's. Made by `compiled_step`.
    """

    def __init__(self, model: Decoder, states: Sequence[Any], steps: Steps) -> None:
        self._model, self._steps = model, steps
        self._x = torch.zeros(steps.rows, model.spec.d_model)
        for layer, state in zip(model.layers, states, strict=True):
            steps.reuse()
            self._layer(cast(Layer, layer), state)
        steps.reuse()
        weight = model.embed.weight if model.head.weight is None else model.head.weight
        self._logits = product(steps, weight, norm(steps, model.norm, self._x), model.head.bias)

    @property
    def num_python(self) -> int:
        """Blocks that run as they are."""
        return self._steps.num_python

    def __call__(self, tokens: Tensor, context: Context) -> Tensor:
        self._x.copy_(self._model.embed(tokens[:, None], context)[:, 0])
        self._steps.run(context.past, context)
        return self._model.head.scaled(self._logits)

    def _layer(self, layer: Layer, state: Any) -> None:
        """As `Layer.forward`: the residual stream is changed in place."""
        steps, x = self._steps, self._x
        beside = None
        if layer.beside is not None:
            beside = self._ffn(layer.beside, norm(steps, layer.beside_norm, x))
        branches = [part for part in (layer.mixer, layer.ffn, layer.beside) if part is not None]

        def close(part: object, branch: Tensor) -> None:
            last = part is branches[-1] and layer.scale is not None
            add(steps, x, branch, layer.residual_scale, float(layer.scale) if last else 1.0)  # type: ignore[arg-type]

        if layer.mixer is not None:
            y = self._mixer(layer.mixer, state, norm(steps, layer.mixer_norm, x))
            close(layer.mixer, norm(steps, layer.mixer_post_norm, y))
        if layer.ffn is not None:
            y = self._ffn(layer.ffn, norm(steps, layer.ffn_norm, x))
            close(layer.ffn, norm(steps, layer.ffn_post_norm, y))
        if beside is not None:
            close(layer.beside, beside)

    def _mixer(self, block: Any, state: Any, x: Tensor) -> Tensor:
        if knows_mixer(block, state):
            return attention(self._steps, block, state, x)
        return self._as_it_is(lambda given, context: block(given, context, state), x)

    def _ffn(self, block: Any, x: Tensor) -> Tensor:
        return ffn(self._steps, block, x) if knows_ffn(block) else self._as_it_is(block, x)

    def _as_it_is(self, block: Any, x: Tensor) -> Tensor:
        steps, y = self._steps, self._steps.buffer(*x.shape)
        steps.python(lambda: y.copy_(block(x.to(steps.dtype)[:, None], steps.context)[:, 0]))
        return y


def compiled_step(
    model: Decoder, states: Sequence[Any], start: int, num_new: int, rows: int, padding: Tensor | None
) -> CompiledStep | str:
    """The step that continues `rows` texts of which the states hold `start` tokens each; or why there is none.

    Args:
        num_new: how many tokens will be passed at most.
        padding: [b] int64 or None, as in `Context`.
    """
    if not (readable(model.embed.weight) and fit(model.norm) and fit(model.head)):
        return "the weights must be fp32 or bf16 and lie whole in the memory of the processor"
    if rows > MOST_ROWS:
        return f"at most {MOST_ROWS} texts at a time"
    found = library()
    if found is None:
        return "there are no compiled kernels"
    use_huge_pages(model.parameters())
    return CompiledStep(model, states, Steps(found, rows, model.embed.weight.dtype, start, num_new, padding))
