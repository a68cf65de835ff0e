"""The two ends of a decoder: token ids in, logits out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.base import Context
from zoo.blocks.linear_loss import linear_cross_entropy, shaped
from zoo.spec.model import EmbeddingSpec, HeadSpec


class Embedding(nn.Module):
    """From token ids [b, s] to the residual stream [b, s, d]."""

    def __init__(self, vocab_size: int, d_model: int, spec: EmbeddingSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.positions = nn.Parameter(torch.empty(spec.positions, d_model)) if spec.positions else None
        self.scale = math.sqrt(d_model) if spec.scale == "sqrt_d_model" else spec.scale

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        return self.finish(F.embedding(tokens, self.weight), context.positions, self.positions)

    def finish(self, x: Tensor, positions: Tensor, table: Tensor | None) -> Tensor:
        """Scale the found rows x [b, s, d], and add those of the table of positions [b or 1, s] if there is one."""
        if self.scale != "none":
            # Rounded to the weights' dtype first: released models were trained with the rounded constant.
            x = x * torch.tensor(self.scale, dtype=x.dtype, device=x.device)
        return x if table is None else x + F.embedding(positions, table)

    def init_weights(self, std: float, out_std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=std)


class Head(nn.Module):
    """From the residual stream [..., d] to logits [..., vocab]."""

    def __init__(self, d_model: int, vocab_size: int, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = None if spec.tied else nn.Parameter(torch.empty(vocab_size, d_model))
        self.bias = nn.Parameter(torch.empty(vocab_size)) if spec.bias else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.scaled(F.linear(x, embedding if self.weight is None else self.weight, self.bias))

    def scaled(self, logits: Tensor) -> Tensor:
        """Logits [..., vocab] after the factor and the soft cap, if there are any."""
        return shaped(logits, self.spec.scale, self.spec.softcap)

    def cross_entropy(self, x: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
        """The summed cross-entropy of the logits of x [b, s, d] and targets [b, s] int64: a scalar, fp32 at least."""
        weight, spec = embedding if self.weight is None else self.weight, self.spec
        return linear_cross_entropy(x.flatten(0, -2), weight, targets.flatten(), self.bias, spec.scale, spec.softcap)

    def init_weights(self, std: float, out_std: float) -> None:
        if self.weight is not None:
            nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
