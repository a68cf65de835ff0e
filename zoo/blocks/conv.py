"""A causal convolution of every channel with itself, shared by state-space, delta-rule and short-convolution mixers."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.blocks.base import Context
from zoo.blocks.compiled_mixers import CompiledConv, fits

ConvActivation = Literal["silu", "none"]


def zero_padding(x: Tensor, context: Context) -> Tensor:
    """x [b, s, ...] with zeros where a token is padding, so that it adds nothing to any state."""
    if context.padding is None:
        return x
    padding = context.padding

    def make() -> Tensor:
        slots = torch.arange(context.past, context.past + x.shape[1], device=x.device)
        return slots < padding[:, None]

    is_padding = context.once(("is_padding", x.shape[1]), make)
    return x.masked_fill(is_padding.view(*is_padding.shape, *(1 for _ in x.shape[2:])), 0)


class ConvState:
    """The last `width - 1` inputs of a convolution, [b, width - 1, c]; zeros before the first token."""

    def __init__(self, batch_size: int, width: int, channels: int, device: torch.device, dtype: torch.dtype) -> None:
        self.inputs = torch.zeros(batch_size, width - 1, channels, device=device, dtype=dtype)

    def append(self, x: Tensor) -> Tensor:
        """Remember the tokens of a pass, x [b, s, c]; the remembered ones and these, [b, width - 1 + s, c]."""
        joined = torch.cat((self.inputs.to(x.dtype), x), 1)
        self.inputs.copy_(joined[:, joined.shape[1] - self.inputs.shape[1] :])
        return joined

    def select(self, rows: Tensor) -> None:
        """Keep the rows of the batch that `rows` [b'] int64 names, in that order."""
        self.inputs = self.inputs[rows]


class CausalConv(nn.Module):
    """y_t = activation(bias + sum_i weight[:, 0, i] * x_(t - width + 1 + i)), channel by channel.

    Tokens before the first one, padding and other documents count as zeros. Sums are taken in fp32 at least. The weight
    [channels, 1, width] has the layout of torch's grouped convolution.
    """

    def __init__(self, channels: int, width: int, bias: bool = False, activation: ConvActivation = "silu") -> None:
        super().__init__()
        self.channels, self.width, self.activation = channels, width, activation
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor, context: Context | None = None, state: ConvState | None = None) -> Tensor:
        """x [b, s, channels]; the result has its shape and dtype. `state` is continued in place, without gradients.

        Raises:
            ValueError: documents together with a state.
        """
        documents = None
        if context is not None:
            documents = context.documents
            x = zero_padding(x, context)
        if state is None:
            return self._convolve(x, documents)
        if documents is not None:
            raise ValueError("documents are for whole rows; a pass that continues a state has one document a row")
        joined = state.append(x)
        return self._newest(joined) if x.shape[1] == 1 else self._convolve(joined, None)[:, self.width - 1 :]

    def _convolve(self, x: Tensor, documents: Tensor | None) -> Tensor:
        compute = CompiledConv if fits(x, self.weight, self.bias) else _Convolution
        result: Tensor = compute.apply(x, self.weight, self.bias, documents, self.activation == "silu")
        return result

    def _newest(self, x: Tensor) -> Tensor:
        """The last output [b, 1, c] of x [b, width, c]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y = (x.to(wide) * self.weight[:, 0].mT.to(wide)).sum(1, keepdim=True)
        y = y if self.bias is None else y + self.bias
        return (F.silu(y) if self.activation == "silu" else y).to(x.dtype)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> ConvState:
        """An empty state; `dtype` is that of the inputs."""
        return ConvState(batch_size, self.width, self.channels, device, dtype)

    def init_weights(self, std: float, out_std: float) -> None:
        """Uniform within +-1 / sqrt(width), as released models start their convolutions; the bias too."""
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)


class _Convolution(torch.autograd.Function):
    """One multiply-add in place for each tap: several times faster on a CPU than a grouped convolution's backward pass,
    and without a copy of the input for each tap."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None, activated: bool
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        taps = _by_distance(weight, wide)
        y = x.to(wide) * taps[0]
        for distance in range(1, len(taps)):
            y[:, distance:].addcmul_(_earlier(x, documents, distance), taps[distance])
        if bias is not None:
            y += bias
        ctx.save_for_backward(x, weight, bias, documents, y.to(x.dtype) if activated else None)
        return (F.silu(y) if activated else y).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, documents, y = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        taps = _by_distance(weight, wide)
        if y is not None:
            grad = torch.ops.aten.silu_backward(grad, y)
        grad = grad.to(wide)
        grad_x = grad * taps[0]
        grad_taps = torch.empty_like(taps)
        grad_taps[0] = (grad * x).sum((0, 1))
        for distance in range(1, len(taps)):
            later, earlier = grad[:, distance:], _earlier(x, documents, distance)
            grad_taps[distance] = (later * earlier).sum((0, 1))
            grad_x[:, : earlier.shape[1]].addcmul_(_linked(later, documents, distance), taps[distance])
        grad_bias = None if bias is None else grad.sum((0, 1)).to(bias.dtype)
        return grad_x.to(x.dtype), grad_taps.flip(0).mT[:, None].to(weight.dtype), grad_bias, None, None


def _by_distance(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The taps [width, c] of weight [c, 1, width], that of the token itself first."""
    return weight[:, 0].mT.flip(0).to(dtype).contiguous()


def _earlier(x: Tensor, documents: Tensor | None, distance: int) -> Tensor:
    """[b, s - distance, c]: what the tokens from `distance` on see so far behind them."""
    return _linked(x[:, : max(x.shape[1] - distance, 0)], documents, distance)


def _linked(x: Tensor, documents: Tensor | None, distance: int) -> Tensor:
    """x [b, s - distance, c] with zeros where two tokens `distance` apart belong to different documents."""
    if documents is None:
        return x
    later, earlier = documents[:, distance:], documents[:, : x.shape[1]]
    return x.masked_fill((later != earlier)[..., None], 0)
