"""The decoder-only language model that a `ModelSpec` describes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.blocks.base import Context, State, initialize
from zoo.blocks.embedding import Embedding, Head
from zoo.blocks.layer import Layer, MTPBlock
from zoo.blocks.linear_loss import IGNORED
from zoo.blocks.norm import Norm
from zoo.blocks.roles import init_scale, role_of
from zoo.blocks.unfilled import unfilled
from zoo.spec.model import ModelSpec

if TYPE_CHECKING:
    from zoo.blocks.moe import MoE


@dataclass(frozen=True)
class Losses:
    """The objective of one batch; with peers (`zoo.blocks.base.Peers`), the parts of it that are this process's."""

    total: Tensor
    """Scalar: the cross-entropy plus every other term times its coefficient. What to call `backward` on."""
    items: dict[str, Tensor]
    """Every term by name without its coefficient, detached; `cross_entropy` is the mean over the targets that count."""
    num_tokens: Tensor
    """int64 scalar: the targets that count, those of the peers too."""


class Decoder(nn.Module):
    """Embedding, layers, final norm, head. `decoder(tokens)` maps [b, s] int64 to logits [b, s, vocab].

    Its parameters are named `embed.*`, `layers.N.mixer.*`, `layers.N.ffn.*` (with `_norm` and `_post_norm` beside
    them), `norm.*` and `head.*`; a tied head has no matrix of its own.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.recompute: Literal["none", "layer"] = "none"
        """`layer` keeps only each layer's input for the backward pass and computes the rest again."""
        self.decoding: Literal["auto", "eager", "compiled"] = "auto"
        """How one token a row is passed when text is written: block by block (`eager`), or by kernels that are compiled
        for this processor, in fp32 (`zoo.decoding`). `auto`: compiled where that is possible and worth it."""
        self.embed = Embedding(spec.vocab_size, spec.d_model, spec.embedding)
        self.layers = nn.ModuleList(Layer(spec, spec.kinds[kind]) for kind in spec.layer_kinds)
        self.norm = Norm(spec.d_model, spec.norm)
        self.head = Head(spec.d_model, spec.vocab_size, spec.head)
        mtp = spec.mtp if spec.mtp and spec.mtp.enabled else None
        self.mtp = nn.ModuleList(MTPBlock(spec, mtp.layers) for _ in range(mtp.num_blocks)) if mtp else None

    def forward(self, tokens: Tensor, context: Context | None = None, states: Sequence[Any] | None = None) -> Tensor:
        """Logits [b, s, vocab] of tokens [b, s] int64.

        Args:
            context: positions, padding, documents; None: whole rows from position 0.
            states: one for each layer, from `new_states`, continued in place.
        """
        return self.logits(self.hidden(tokens, context or Context.of(tokens), states))

    def hidden(self, tokens: Tensor, context: Context, states: Sequence[Any] | None = None) -> Tensor:
        """The residual stream [b, s, d] after the final norm."""
        x = self.embed(tokens, context)
        for index, layer in enumerate(self.layers):
            x = self.pass_layer(layer, x, context, states[index] if states is not None else None)
        return self.norm(x)

    def pass_layer(self, layer: nn.Module, x: Tensor, context: Context, state: Any = None) -> Tensor:
        """The residual stream [b, s, d] after one of the layers; what `recompute` says holds."""
        context.sparing = self.recompute != "layer"
        if self.recompute == "layer" and torch.is_grad_enabled():
            return checkpoint(layer, x, context, use_reentrant=False, context_fn=context.recompute_contexts)
        return layer(x, context, state)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of the hidden state [..., d]."""
        return self.head(hidden, self.embed.weight)

    def loss(self, tokens: Tensor, targets: Tensor, context: Context | None = None) -> Losses:
        """The training objective: tokens and targets [b, s] int64; a target of -100 does not count."""
        context = context or Context.of(tokens)
        return self.objective(self.hidden(tokens, context), tokens, targets, context)

    def objective(self, hidden: Tensor, tokens: Tensor, targets: Tensor, context: Context) -> Losses:
        """The training objective of tokens whose hidden state [b, s, d] is already known."""
        total = cross_entropy = self._cross_entropy(hidden, targets, context)
        items = {"cross_entropy": cross_entropy.detach()}
        if self.mtp is not None and self.spec.mtp is not None:
            further = self._further_losses(hidden, tokens, targets, context)
            context.record("mtp", torch.stack(further).mean(), self.spec.mtp.loss_weight)
        for name, values in context.losses.items():
            for value, coefficient in zip(values, context.coefficients[name], strict=True):
                total = total + coefficient * value
            items[name] = torch.stack(values).mean().detach()
        return Losses(total, items, _num_targets(targets, context))

    def _cross_entropy(self, hidden: Tensor, targets: Tensor, context: Context) -> Tensor:
        """Mean over the targets that count; 0 when none does."""
        summed = self.head.cross_entropy(hidden, self.embed.weight, targets)
        return summed / _num_targets(targets, context).clamp_min(1)

    def _further_losses(self, hidden: Tensor, tokens: Tensor, targets: Tensor, context: Context) -> list[Tensor]:
        """The cross-entropy of every depth of multi-token prediction."""
        assert self.spec.mtp is not None and self.mtp is not None  # noqa: PT018
        losses = []
        for depth in range(1, self.spec.mtp.depth + 1):
            block = self.mtp[0 if self.spec.mtp.shared else depth - 1]
            shifted, goals = tokens.roll(-depth, 1), targets.roll(-depth, 1)
            goals[:, -depth:] = IGNORED
            if context.documents is not None:
                goals[context.documents.roll(-depth, 1) != context.documents] = IGNORED
            hidden = block(hidden, self.embed(shifted, context), context)
            losses.append(self._cross_entropy(hidden, goals, context))
        return losses

    def generate(self, tokens: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Continue tokens [b, s]; see `zoo.generate.generate` for the options."""
        from zoo.generate import generate

        return generate(self, tokens, max_new_tokens, **options)

    def new_states(self, batch_size: int, max_len: int) -> list[State | None]:
        """An empty state for each layer, for sequences of at most `max_len` tokens."""
        device, dtype = self.embed.weight.device, self.embed.weight.dtype
        mixers = [cast(Layer, layer).mixer for layer in self.layers]
        return [None if mixer is None else mixer.new_state(batch_size, max_len, device, dtype) for mixer in mixers]

    def moe_layers(self) -> dict[int, MoE]:
        """The mixture-of-experts blocks by the index of their layer; those of MTP blocks come after the trunk's."""
        return dict(self._moe_layers())

    def _moe_layers(self) -> Iterator[tuple[int, MoE]]:
        from zoo.blocks.moe import MoE

        further = [layer for block in self.mtp or () for layer in cast(MTPBlock, block).layers]
        for index, layer in enumerate([*self.layers, *further]):
            yield from ((index, part) for part in layer.modules() if isinstance(part, MoE))

    def reset_weights(self) -> None:
        """Random initial weights as the description says (`InitSpec`)."""
        for name, part in self.parts():
            self.reset_part(name, part)

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The parts that hold weights, by name, in the order in which these are drawn."""
        for name, part in self.named_children():
            if isinstance(part, nn.ModuleList):
                yield from ((f"{name}.{index}", each) for index, each in enumerate(part))
            else:
                yield name, part

    @torch.no_grad()
    def reset_part(self, name: str, part: nn.Module) -> None:
        """Random initial weights for one of `parts`."""
        init, writes = self.spec.init, _count_writes(self.spec)
        out_std = init.std / math.sqrt(writes) if init.depth_scaled else init.std
        initialize(part, init.std, out_std)
        if self.spec.width_ratio != 1:
            for own, parameter in part.named_parameters():
                parameter.mul_(init_scale(role_of(f"{name}.{own}", parameter), self.spec.width_ratio))


def _num_targets(targets: Tensor, context: Context) -> Tensor:
    count = (targets != IGNORED).sum()
    return count if context.peers is None else context.peers.sum_over_rows(count)


def _count_writes(spec: ModelSpec) -> int:
    """Branches that are added to the residual stream."""
    kinds = [spec.kinds[kind] for kind in spec.layer_kinds]
    return sum((kind.mixer is not None) + (kind.ffn is not None) for kind in kinds)


def build(
    spec: ModelSpec, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, *, init: bool = True
) -> Decoder:
    """The described model, made on `device` without a detour.

    Args:
        dtype: of the weights; None: torch's default. Buffers (correction biases, routing counters) keep theirs.
        init: False leaves the weights as the memory was, for a caller who fills them.
    """
    with unfilled():
        model = Decoder(spec)
    if dtype is not None:
        cast_parameters(model, dtype)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        for buffer in model.buffers():
            buffer.zero_()
        if init:
            with torch.no_grad():
                model.reset_weights()
    return model


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of all parameters but those that their module keeps exact; buffers stay exact too."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name in getattr(module, "exact_parameters", ()):
                continue
            cast = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
            module.register_parameter(name, cast)
