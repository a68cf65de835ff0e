"""The two ends of a decoder: token ids in, logits out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.base import Context
from zoo.spec.model import EmbeddingSpec, HeadSpec


class Embedding(nn.Module):
    """From token ids [b, s] to the residual stream [b, s, d]."""

    def __init__(self, vocab_size: int, d_model: int, spec: EmbeddingSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.positions = nn.Parameter(torch.empty(spec.positions, d_model)) if spec.positions else None
        self.scale = math.sqrt(d_model) if spec.scale == "sqrt_d_model" else spec.scale

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        x = F.embedding(tokens, self.weight)
        if self.scale != "none":
            # Rounded to the weights' dtype first: released models were trained with the rounded constant.
            x = x * torch.tensor(self.scale, dtype=x.dtype, device=x.device)
        if self.positions is not None:
            x = x + F.embedding(context.positions, self.positions)
        return x

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
        logits = F.linear(x, embedding if self.weight is None else self.weight, self.bias)
        if self.spec.scale != 1:
            logits = logits * self.spec.scale
        if self.spec.softcap is not None:
            logits = torch.tanh(logits / self.spec.softcap) * self.spec.softcap
        return logits

    def init_weights(self, std: float, out_std: float) -> None:
        if self.weight is not None:
            nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
