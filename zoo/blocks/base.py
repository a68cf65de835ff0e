"""What every block module has in common: how it is made, what one forward pass shares, how its weights start."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Hashable, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from zoo.spec.base import TypedSpec, decode, explained, mirrored
from zoo.spec.block import BlockSpec
from zoo.spec.norm import NormSpec

T = TypeVar("T")


class Peers(Protocol):
    """The processes that share one batch. Each computes its part of every mean, and the parts add up to it.

    What is summed takes no part in gradients.
    """

    def sum_within_rows(self, counts: Tensor) -> Tensor:
        """The sum over the processes that hold other tokens of the same rows."""
        ...

    def sum_over_rows(self, counts: Tensor) -> Tensor:
        """The sum over the processes that hold other rows."""
        ...


@dataclass
class Context:
    """What the blocks of one forward pass share. Letters: `b` batch, `s` tokens of this pass."""

    positions: Tensor
    """[b or 1, s] int64: the place of each token in its own sequence, from 0."""
    past: int = 0
    """Tokens that the states of the mixers already hold, the same for all rows."""
    padding: Tensor | None = None
    """[b] int64: how many tokens at the left of each row are padding; None: none anywhere."""
    documents: Tensor | None = None
    """[b, s] int64: tokens of a row exchange information only inside their own document; None: one document a row."""
    losses: MutableMapping[str, list[Tensor]] = field(default_factory=UserDict)
    """Terms of the objective beside the cross-entropy, one scalar for each layer that has the term. No plain dict:
    `fully_shard` copies those that it finds among the arguments of a layer."""
    coefficients: dict[str, list[float]] = field(default_factory=dict)
    """What each of `losses` is multiplied by before it is added."""
    peers: Peers | None = None
    """Who holds the rest of the batch; None: nobody, all of it is here."""
    recomputing: bool = False
    """True while activations are computed a second time in a backward pass: then nothing is recorded or counted."""
    sparing: bool = False
    """Whether blocks may keep less for the backward pass than torch does (`zoo.blocks.sparing`)."""
    _memo: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, x: Tensor) -> Context:
        """The context of whole rows without padding: x [b, s, ...]."""
        return cls(torch.arange(x.shape[1], device=x.device)[None])

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, computed once in this pass for each `key` (rotary tables, masks: the same in many layers)."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def record(self, name: str, value: Tensor, coefficient: float) -> None:
        """Add `coefficient * value` to the objective, itemised under `name`."""
        if not self.recomputing:
            self.losses.setdefault(name, []).append(value)
            self.coefficients.setdefault(name, []).append(coefficient)

    def recompute_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For `torch.utils.checkpoint(context_fn=...)`: nothing around the first pass, `recomputing` in the second."""
        return nullcontext(), self._recompute()

    @contextmanager
    def _recompute(self) -> Any:
        self.recomputing = True
        try:
            yield
        finally:
            self.recomputing = False


class Block(nn.Module):
    """A sequence mixer or channel mixer. Made from a description, or from plain arguments of the same names:

    `Attention(512, num_heads=8, num_kv_heads=2)` is `Attention(512, AttentionSpec(num_heads=8, num_kv_heads=2))`.

    A sequence mixer is called as `mixer(x, context, state)`, a channel mixer as `ffn(x, context)`; x and the result are
    [b, s, d_model]. Without a context the rows are whole sequences.
    """

    describes: ClassVar[type[BlockSpec]]

    def __init__(self, d_model: int, spec: BlockSpec | None = None, *, norm: NormSpec | None = None, **options: Any):
        """
        Args:
            d_model: width of the residual stream.
            spec: the description; or give its fields as `options`.
            norm: the model's norm, which norms inside the block take after.

        Raises:
            ConfigError: the options are not a sound description.
        """
        super().__init__()
        self.d_model = d_model
        self.norm_spec = norm or NormSpec()
        found = described(self.describes, spec, options)
        self.spec = explained(lambda: found.resolved(d_model), self.describes.__name__)


S = TypeVar("S", bound=TypedSpec)


def described(describes: type[S], spec: TypedSpec | None, options: dict[str, Any]) -> S:
    """`spec`, or the one that plain `options` describe; exactly one of them may be given."""
    if spec is None:
        return decode(describes, options, describes.__name__)
    if options or not isinstance(spec, describes):
        raise TypeError(f"give a {describes.__name__} or its fields, found {type(spec).__name__} and {sorted(options)}")
    return spec


@runtime_checkable
class State(Protocol):
    """What a sequence mixer remembers between the passes of a generation. Updated in place."""

    def select(self, rows: Tensor) -> None:
        """Keep the rows of the batch that `rows` [b'] int64 names, in that order."""
        ...


class Mixer(Block):
    """A sequence mixer."""

    def forward(self, x: Tensor, context: Context | None = None, state: Any = None) -> Tensor:
        raise NotImplementedError

    def new_state(self, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty state for sequences of at most `max_len` tokens; reading and continuing them gives equal results."""
        raise NotImplementedError


def build_block(spec: BlockSpec, d_model: int, norm: NormSpec) -> Block:
    """The module of a description: the class in the mirrored module of `zoo.blocks` that describes itself by it."""
    block: type[Block] = mirrored(type(spec), "blocks", Block, lambda found: getattr(found, "describes", None))
    return block(d_model, spec, norm=norm)


class Linear(nn.Linear):
    """A matrix product, y = x W^T + b. `writes_residual` marks the last matrix of a branch for its smaller start."""

    def __init__(self, d_in: int, d_out: int, bias: bool = False, writes_residual: bool = False) -> None:
        super().__init__(d_in, d_out, bias=bias)
        self.writes_residual = writes_residual

    def matrix(self) -> Tensor:
        """W [out, in], for products that are taken elsewhere."""
        return self.weight

    def init_weights(self, std: float, out_std: float) -> None:
        nn.init.normal_(self.weight, std=out_std if self.writes_residual else std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def initialize(module: nn.Module, std: float, out_std: float) -> None:
    """Give every weight below `module` its random start: each module that holds weights has an `init_weights`.

    Args:
        std: standard deviation of matrices and embeddings.
        out_std: of matrices that write to the residual stream.
    """
    for name, part in module.named_modules():
        if hasattr(part, "init_weights"):
            part.init_weights(std, out_std)
        elif any(True for _ in part.parameters(recurse=False)) or any(True for _ in part.buffers(recurse=False)):
            raise TypeError(f"{name} ({type(part).__name__}) holds weights and has no init_weights")
