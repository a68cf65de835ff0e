"""A layer of a decoder, and the small decoder that predicts one token further."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from zoo.blocks.base import Block, Context, Linear, Mixer, build_block
from zoo.blocks.norm import Norm
from zoo.spec.model import KindSpec, ModelSpec
from zoo.spec.pattern import expand


class Layer(nn.Module):
    """A sequence mixer, then a channel mixer, each on its branch of the residual stream; either may be absent."""

    scale: Tensor | None

    def __init__(self, spec: ModelSpec, kind: KindSpec) -> None:
        super().__init__()
        self.residual_scale = spec.residual_scale

        def norm(slot: str | None, wanted: bool = True) -> Norm | None:
            return Norm(spec.d_model, spec.norm) if slot and wanted else None

        def block(slot: str | None) -> Block | None:
            return build_block(spec.slots[slot], spec.d_model, spec.norm) if slot else None

        placement, ffn_placement = spec.placement_of(kind), spec.ffn_placement_of(kind)
        self.mixer_norm = norm(kind.mixer, placement != "post")
        self.mixer = cast(Mixer | None, block(kind.mixer))
        self.mixer_post_norm = norm(kind.mixer, placement != "pre")
        self.ffn_norm = norm(kind.ffn, ffn_placement != "post")
        self.ffn = block(kind.ffn)
        self.ffn_post_norm = norm(kind.ffn, ffn_placement != "pre")
        self.beside_norm, self.beside = norm(kind.beside), block(kind.beside)
        self.register_buffer("scale", torch.empty(1) if spec.layer_scale else None)

    def forward(self, x: Tensor, context: Context, state: Any = None) -> Tensor:
        """x [b, s, d]; the result has its shape. `state` is the mixer's, continued in place."""
        beside = None if self.beside is None else self.beside(self.beside_norm(x), context)  # type: ignore[misc]
        if self.mixer is not None:
            x = self._add(x, _branch(self.mixer_norm, self.mixer, x, context, state), self.mixer_post_norm)
        if self.ffn is not None:
            x = self._add(x, _branch(self.ffn_norm, self.ffn, x, context), self.ffn_post_norm)
        if beside is not None:
            x = self._add(x, beside, None)
        return x if self.scale is None else x * self.scale.to(x.dtype)

    def init_weights(self, std: float, out_std: float) -> None:
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def _add(self, x: Tensor, branch: Tensor, norm: nn.Module | None) -> Tensor:
        if norm is not None:
            branch = norm(branch)
        return x + (branch if self.residual_scale == 1 else branch * self.residual_scale)


def _branch(norm: Norm | None, block: Block, x: Tensor, context: Context, *state: Any) -> Tensor:
    """The block of x after its norm, of which the backward pass keeps x alone."""
    if norm is None:
        result: Tensor = block(x, context, *state)
        return result
    y = norm(x)
    with norm.spared(x, y, context.sparing):
        result = block(y, context, *state)
    return result


class MTPBlock(nn.Module):
    """Multi-token prediction of one depth (arXiv:2412.19437, equations 21 to 23).

    As in Megatron, the hidden state comes from after the final norm, of the trunk or of the depth before.
    """

    def __init__(self, spec: ModelSpec, pattern: str) -> None:
        super().__init__()
        self.embed_norm = Norm(spec.d_model, spec.norm)
        self.hidden_norm = Norm(spec.d_model, spec.norm)
        self.proj = Linear(2 * spec.d_model, spec.d_model)
        self.layers = nn.ModuleList(Layer(spec, spec.kinds[kind]) for kind in expand(pattern))
        self.norm = Norm(spec.d_model, spec.norm)

    def forward(self, hidden: Tensor, embedded: Tensor, context: Context) -> Tensor:
        """The hidden state [b, s, d] after this depth.

        Args:
            hidden: [b, s, d], normed, of the depth before.
            embedded: [b, s, d], the embeddings of the tokens that the depth before predicts.
        """
        x = self.proj(torch.cat((self.embed_norm(embedded), self.hidden_norm(hidden)), -1))
        for layer in self.layers:
            x = layer(x, context)
        return self.norm(x)
