"""A whole model: slots, kinds and a layer pattern."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from zoo.spec.base import Spec, choice_of, near, problem, refuse_unknown_keys
from zoo.spec.block import BlockSpec, FFNSpec, MixerSpec
from zoo.spec.norm import NormSpec
from zoo.spec.pattern import PatternError, expand

if TYPE_CHECKING:
    from zoo.plan.flops import FlopCount
    from zoo.plan.params import ParamCount

Placement = Literal["pre", "post", "sandwich"]


class CardSpec(Spec):
    """Where a released model's numbers come from."""

    family: str
    source: str
    context: PositiveInt
    """Longest sequence, in tokens, that the release is meant for."""
    claimed_total: str | None = None
    """Parameters as its makers state them."""
    claimed_active: str | None = None


class KindSpec(Spec):
    """A layer: a sequence mixer, then a channel mixer; either may be absent."""

    mixer: str | None = None
    ffn: str | None = None
    beside: str | None = None
    """A channel mixer that reads the layer's input through a norm of its own and is added at the layer's end."""
    placement: Placement | None = None
    """Absent: the model's norm_placement."""
    ffn_placement: Placement | None = None
    """Of the ffn where it differs from the mixer's."""

    @model_validator(mode="after")
    def _check(self) -> KindSpec:
        if self.mixer is None and self.ffn is None:
            raise problem("mixer", None, "a kind needs a mixer, an ffn or both")
        return self


class EmbeddingSpec(Spec):
    """From token ids to the residual stream."""

    scale: Literal["none", "sqrt_d_model"] | PositiveFloat = "none"
    """Factor on the embedding. `sqrt_d_model` is rounded to the weights' dtype first."""
    positions: PositiveInt | None = None
    """Rows of a learned table of absolute positions that is added; absent: no table."""


class HeadSpec(Spec):
    """From the residual stream to logits."""

    tied: bool = False
    """The output matrix is the embedding table."""
    bias: bool = False
    scale: float = 1.0
    """Factor on the logits."""
    softcap: PositiveFloat | None = None
    """Logits become softcap * tanh(logit / softcap)."""


class MTPSpec(Spec):
    """Multi-token prediction (arXiv:2412.19437): small decoders that each see one further token."""

    layers: str
    """Pattern of one block over the model's kinds."""
    depth: PositiveInt = 1
    """How many further tokens are predicted."""
    shared: bool = False
    """All depths use one block with the same weights."""
    enabled: bool = False
    """Build and train the blocks. Off: they are described and counted, the trunk stands alone."""
    loss_weight: PositiveFloat = 0.1
    """Factor on the mean of their cross-entropies in the objective."""

    @property
    def num_blocks(self) -> int:
        """Blocks with weights of their own."""
        return 1 if self.shared else self.depth


class InitSpec(Spec):
    """Random initial weights: normal with `std`, biases zero, norm weights neutral."""

    std: PositiveFloat = 0.02
    depth_scaled: bool = True
    """Matrices that write to the residual stream start at std / sqrt(number of writes)."""
    width_base: PositiveInt | None = None
    """The d_model that `std` and the learning rate were found on: at other widths initial weights and learning rates
    follow from it (muP, arXiv:2203.03466), if d_ffn and the number of heads grow as d_model does. Absent: both are
    taken as they are."""


class ModelSpec(Spec):
    """A decoder-only language model. All its blocks live in `slots`; in YAML they stand directly under `model`."""

    name: str = "unnamed"
    card: CardSpec | None = None
    d_model: PositiveInt
    vocab_size: PositiveInt
    slots: dict[str, choice_of(BlockSpec)]  # type: ignore[valid-type]
    kinds: dict[str, KindSpec]
    layers: str
    norm: NormSpec = NormSpec()
    norm_placement: Placement = "pre"
    """`pre`: x + f(norm(x)). `post`: x + norm(f(x)). `sandwich`: x + norm(f(norm(x)))."""
    residual_scale: float = 1.0
    """Factor on every branch before it is added to the residual stream."""
    layer_scale: bool = False
    """Each layer ends with a factor on the residual stream: a stored number, not trained."""
    mtp: MTPSpec | None = None
    embedding: EmbeddingSpec = EmbeddingSpec()
    head: HeadSpec = HeadSpec()
    init: InitSpec = Field(default_factory=InitSpec)

    @model_validator(mode="before")
    @classmethod
    def _gather_slots(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "slots" in value:
            return value
        slots = {key: item for key, item in value.items() if key not in cls.model_fields and _is_block(item)}
        rest = {key: item for key, item in value.items() if key not in slots}
        refuse_unknown_keys(rest, [*cls.model_fields, *slots], "the model (blocks have a type)")
        return {**rest, "slots": slots}

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        self._check_pattern(("layers",), self.layers)
        if self.mtp is not None:
            self._check_pattern(("mtp", "layers"), self.mtp.layers)
        for name, kind_spec in self.kinds.items():
            self._check_slot(("kinds", name, "mixer"), kind_spec.mixer, MixerSpec)
            self._check_slot(("kinds", name, "ffn"), kind_spec.ffn, FFNSpec)
            self._check_slot(("kinds", name, "beside"), kind_spec.beside, FFNSpec)
        used = {slot for kind in self.kinds.values() for slot in (kind.mixer, kind.ffn, kind.beside)}
        for slot in self.slots:
            if slot not in used:
                raise problem(slot, slot, "no kind uses this block", "name it in a kind, or remove it")
        if self.init.width_base is not None and self.head.tied:
            rule = "an output matrix that is the embedding table cannot start and learn by rules of its own"
            raise problem(("init", "width_base"), self.init.width_base, rule, "set head.tied=false")
        self.__dict__["slots"] = {name: _resolve(name, block, self.d_model) for name, block in self.slots.items()}
        return self

    def _check_pattern(self, loc: tuple[str, ...], pattern: str) -> None:
        try:
            kinds = expand(pattern)
        except PatternError as error:
            raise problem(loc, pattern, str(error)) from None
        for kind in dict.fromkeys(kinds):
            if kind not in self.kinds:
                raise problem(loc, kind, f"allowed kinds: {', '.join(self.kinds)}", near(kind, self.kinds))

    def _check_slot(self, loc: tuple[str, ...], slot: str | None, base: type[BlockSpec]) -> None:
        if slot is not None and not isinstance(self.slots.get(slot), base):
            options = [name for name, block in self.slots.items() if isinstance(block, base)]
            raise problem(loc, slot, f"allowed: {', '.join(options) or 'none is described'}", near(slot, options))

    @cached_property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of every layer, in order."""
        return expand(self.layers)

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def width_ratio(self) -> float:
        """Over the width that initial weights and learning rates were found on."""
        return self.d_model / (self.init.width_base or self.d_model)

    def placement_of(self, kind: KindSpec) -> Placement:
        """Where the norms of the mixer of a layer of this kind stand."""
        return kind.placement or self.norm_placement

    def ffn_placement_of(self, kind: KindSpec) -> Placement:
        """Where the norms of its ffn stand."""
        return kind.ffn_placement or self.placement_of(kind)

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        slots = data.pop("slots")
        return {**data, **slots}

    # The arithmetic lives one floor up, in zoo/plan; these two are its doors, opened only when called.

    def params(self) -> ParamCount:
        """Exact parameter counts (conventions: `zoo.plan.params.ParamCount`)."""
        return importlib.import_module("zoo.plan.params").count_params(self)

    def flops(self, seq_len: int) -> FlopCount:
        """Forward FLOPs per token at `seq_len` (conventions: `zoo.plan.flops.FlopCount`)."""
        return importlib.import_module("zoo.plan.flops").count_flops(self, seq_len)


def _is_block(value: Any) -> bool:
    return isinstance(value, BlockSpec) or (isinstance(value, Mapping) and "type" in value)


def _resolve(slot: str, block: BlockSpec, d_model: int) -> BlockSpec:
    try:
        return block.resolved(d_model)
    except ValidationError as error:
        detail = error.errors()[0]
        raise problem((slot, *detail["loc"]), detail["input"], detail["msg"]) from None
