"""The two ends of a decoder with the vocabulary cut along tp."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from zoo.blocks.autocast import autocast_dtype, without_autocast
from zoo.blocks.base import Context
from zoo.blocks.embedding import Embedding, Head
from zoo.blocks.linear_loss import CHUNK_NUMBERS, IGNORED, shaped
from zoo.decoder import Decoder
from zoo.parallel.cuts import Cut, cut_parameters
from zoo.parallel.mesh import waited
from zoo.parallel.sequence import gather_tokens, own_tokens, scatter_tokens
from zoo.spec.base import ConfigError

_BY_TOKEN = Cut((Shard(0),))


class Vocabulary(NamedTuple):
    """The tokens whose rows a process has."""

    tp: DeviceMesh
    start: int
    stop: int

    @classmethod
    def of(cls, num_tokens: int, tp: DeviceMesh) -> Vocabulary:
        """The share of `num_tokens`, as DTensor cuts a first axis."""
        longest = -(-num_tokens // tp.size())
        if longest * (tp.size() - 1) >= num_tokens:
            raise ConfigError(f"layout.tp: found {tp.size()}; that is too many for a vocabulary of {num_tokens}")
        start = tp.get_local_rank() * longest
        return cls(tp, start, min(start + longest, num_tokens))

    def places(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each of `tokens` is one of these, and its row (any row where it is not)."""
        own = (tokens >= self.start) & (tokens < self.stop)
        return own, (tokens - self.start).clamp(0, self.stop - self.start - 1)


def cut_vocabulary(model: Decoder, tp: DeviceMesh) -> None:
    """Cut the embedding table and the head of `model`, where they are, and let them work with cut sequences."""
    vocabulary = Vocabulary.of(model.spec.vocab_size, tp)
    if isinstance(model.embed, Embedding):
        places = {} if model.embed.positions is None else {"positions": Cut()}
        cut_parameters(model.embed, {"weight": _BY_TOKEN, **places}, tp)
        model.embed.forward = _Lookup(model.embed, vocabulary)  # type: ignore[method-assign]
    if isinstance(model.head, Head):
        names = [name for name, _ in model.head.named_parameters()]
        cut_parameters(model.head, dict.fromkeys(names, _BY_TOKEN), tp)
        logits = _Logits(model.head, vocabulary)
        model.head.forward = logits.all  # type: ignore[method-assign]
        model.head.cross_entropy = logits.cross_entropy  # type: ignore[method-assign]


class _Lookup:
    """The embedding of the own tokens [b, s / tp, d] of tokens [b, s]."""

    def __init__(self, embed: Embedding, vocabulary: Vocabulary) -> None:
        self.embed, self.vocabulary = embed, vocabulary

    def __call__(self, tokens: Tensor, context: Context) -> Tensor:
        tp = self.vocabulary.tp
        own, rows = self.vocabulary.places(tokens)
        found = F.embedding(rows, _BY_TOKEN.own(self.embed.weight)).masked_fill(~own[..., None], 0)
        positions = None if self.embed.positions is None else Cut().own(self.embed.positions)
        return self.embed.finish(scatter_tokens(found, tp), own_tokens(context.positions, tp), positions)


class _Logits:
    """The logits of the own tokens of the vocabulary, for all tokens of the sequences."""

    def __init__(self, head: Head, vocabulary: Vocabulary) -> None:
        self.head, self.vocabulary = head, vocabulary

    def _weights(self, embedding: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.head.weight, self.head.bias
        return _BY_TOKEN.own(embedding if weight is None else weight), None if bias is None else _BY_TOKEN.own(bias)

    def all(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Logits [b, s, vocab] of x [b, s / tp, d]."""
        tp = self.vocabulary.tp
        weight, bias = self._weights(embedding)
        own = self.head.scaled(F.linear(gather_tokens(x, tp), weight, bias))
        shape = torch.Size((*own.shape[:-1], embedding.shape[0]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            own, tp, [Shard(own.ndim - 1)], run_check=False, shape=shape, stride=stride
        ).full_tensor()

    def cross_entropy(self, x: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
        """The share of the summed cross-entropy that this process answers for: that of the targets in its vocabulary.

        Args:
            x: [b, s / tp, d].
            targets: [b, s] int64.
        """
        weight, bias = self._weights(embedding)
        x = gather_tokens(x, self.vocabulary.tp).flatten(0, -2)
        x = x.to(autocast_dtype(x))
        spec, chunk_len = self.head.spec, max(1, CHUNK_NUMBERS // len(weight))
        settings = (self.vocabulary, spec.scale, spec.softcap, chunk_len, torch.is_grad_enabled())
        with without_autocast(x.device):
            result: Tensor = _CrossEntropy.apply(x, weight, targets.flatten(), bias, *settings)
        return result


class _CrossEntropy(torch.autograd.Function):
    """`zoo.blocks.linear_loss` with a part of the vocabulary: the gradient is that of the sum of all shares."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        vocabulary: Vocabulary,
        scale: float,
        softcap: float | None,
        chunk_len: int,
        with_grad: bool,
    ) -> Tensor:
        needs = with_grad and any(ctx.needs_input_grad)
        wide = torch.promote_types(x.dtype, torch.float32)
        w = weight.to(x.dtype)
        total = torch.zeros((), dtype=wide, device=x.device)
        x_grad, weight_grad = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
        bias_grad = None if bias is None else torch.zeros_like(bias, dtype=wide)
        for start in range(0, len(x), chunk_len):
            rows = slice(start, start + chunk_len)
            logits = (x[rows] @ w.t()).to(wide)
            if bias is not None:
                logits += bias.to(wide)
            capped = shaped(logits, scale, softcap)
            loss, grad = _loss_and_grad(capped, targets[rows], vocabulary)
            total += loss
            if not needs:
                continue
            if softcap is not None:
                grad *= 1 - (capped / softcap).square()
            grad = grad if scale == 1 else grad * scale
            if bias_grad is not None:
                bias_grad += grad.sum(0)
            grad = grad.to(x.dtype)
            torch.mm(grad, w, out=x_grad[rows])
            weight_grad += grad.t() @ x[rows]
        ctx.save_for_backward(x_grad, weight_grad, bias_grad)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, weight_grad, bias_grad = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        bias_grad = None if bias_grad is None else (bias_grad * grad).to(bias_dtype)
        weight_grad = (weight_grad * grad).to(weight_dtype)
        return x_grad * grad.to(x_grad.dtype), weight_grad, None, bias_grad, *(None,) * 5


def _loss_and_grad(logits: Tensor, targets: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """The own share of the summed cross-entropy, and the gradient [t, v] of the whole of it.

    Args:
        logits: [t, v] of the own tokens of the vocabulary.
        targets: [t] int64.
    """
    counts, (own, places) = targets != IGNORED, vocabulary.places(targets)
    peak = waited(funcol.all_reduce(logits.amax(-1), "max", vocabulary.tp))
    shares = (logits - peak[:, None]).exp_()
    summed = waited(funcol.all_reduce(shares.sum(-1), "sum", vocabulary.tp))
    chosen = logits.gather(1, places[:, None])[:, 0]
    loss = torch.where(own, summed.log() + peak - chosen, 0).sum()
    grad = shares.div_(summed[:, None])
    grad.scatter_add_(1, places[:, None], -own[:, None].to(grad.dtype))
    return loss, grad.mul_(counts[:, None])
