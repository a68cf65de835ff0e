"""Attention over keys and values shared by groups of heads."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from zoo.spec.base import Spec, problem, register_spec
from zoo.spec.block import TINY_D_MODEL, MixerSpec
from zoo.spec.indexer import BlockIndexerSpec
from zoo.spec.rope import TINY_CONTEXT, DynamicScaling, LongRopeScaling, RopeSpec


class QueryScaleSpec(Spec):
    """Queries grow with their position p: times 1 + beta * ln(1 + floor((p + shift) / original_context))."""

    beta: float
    original_context: PositiveInt
    shift: int = 0


@register_spec
class AttentionSpec(MixerSpec):
    """Multi-head, grouped-query or multi-query attention (arXiv:2305.13245) with the options of released models."""

    type: Literal["gqa"] = "gqa"
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt | None = None
    """Channels of a query or key head; absent: d_model / num_heads."""
    v_head_dim: PositiveInt | None = None
    """Channels of a value head; absent: head_dim."""
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    """Norm of queries and keys: over each `head`, or over all heads together (`full`)."""
    qk_norm_weight: Literal["model", "none"] = "model"
    """The model's kind of norm weight, or none."""
    qk_norm_after_rope: bool = False
    v_norm: bool = False
    """A weightless norm over each value head."""
    rope: RopeSpec | None = RopeSpec()
    """Absent: no positions."""
    query_scale: QueryScaleSpec | None = None
    mask: Literal["causal", "sliding", "chunked"] = "causal"
    """`causal`: all earlier keys. `sliding`: the last `window` keys. `chunked`: those of the same chunk of `window`."""
    window: PositiveInt | None = None
    """Keys that a query sees, itself included; given exactly when `mask` is sliding or chunked."""
    scale: PositiveFloat | None = None
    """Factor on query-key products; absent: head_dim ** -0.5."""
    softcap: PositiveFloat | None = None
    """Scores become softcap * tanh(score / softcap)."""
    sink: bool = False
    """A learned logit per head that joins the softmax and carries no value."""
    gate: Literal["none", "element", "head"] = "none"
    """Output gate from the block's input, per channel or per head, before the output projection."""
    gate_activation: Literal["sigmoid", "softplus"] = "sigmoid"
    value_scale: float = 1.0
    shared_kv: bool = False
    """Values are the key projection before its norm and rotation; there is no value projection."""
    qkv_clip: PositiveFloat | None = None
    """Projections are clamped to [-qkv_clip, qkv_clip]."""
    indexer: BlockIndexerSpec | None = None
    """Attend only to the blocks of keys that it chooses; absent: to all that `mask` leaves."""

    @model_validator(mode="after")
    def _check(self) -> AttentionSpec:
        if self.num_heads % self.num_kv_heads:
            raise problem("num_kv_heads", self.num_kv_heads, f"must divide num_heads ({self.num_heads})")
        if (self.mask == "causal") == (self.window is not None):
            raise problem(
                "window", self.window, "give it exactly when mask is sliding or chunked", f"mask is {self.mask}"
            )
        if self.shared_kv and self.v_head_dim not in (None, self.head_dim):
            raise problem("v_head_dim", self.v_head_dim, "must be head_dim when shared_kv is on")
        if self.head_dim and self.rope and self.rope.rotary_dim(self.head_dim) % 2:
            raise problem("head_dim", self.head_dim, "head_dim * rope.fraction must be even for rotary positions")
        return self

    @model_validator(mode="after")
    def _check_indexer(self) -> AttentionSpec:
        if self.indexer is None:
            return self
        if self.num_heads % self.indexer.num_heads:
            raise problem(("indexer", "num_heads"), self.indexer.num_heads, f"must divide num_heads ({self.num_heads})")
        if self.mask != "causal":
            raise problem("mask", self.mask, "must be causal with an indexer")
        rotary_dim = self.rope.rotary_dim(self.head_dim) if self.rope and self.head_dim else 0
        if self.indexer.head_dim < rotary_dim:
            rule = f"must be at least the {rotary_dim} channels that turn"
            raise problem(("indexer", "head_dim"), self.indexer.head_dim, rule)
        if self.rope and isinstance(self.rope.scaling, (DynamicScaling, LongRopeScaling)):
            rule = "must not follow the sequence's length with an indexer, whose keys are turned once"
            raise problem(("rope", "scaling", "type"), self.rope.scaling.type, rule)
        return self

    def resolved(self, d_model: int) -> AttentionSpec:
        changes: dict[str, int] = {}
        if self.head_dim is None:
            if d_model % self.num_heads:
                raise problem("num_heads", self.num_heads, f"must divide d_model ({d_model})", "or give head_dim")
            changes["head_dim"] = d_model // self.num_heads
        if self.v_head_dim is None:
            changes["v_head_dim"] = changes.get("head_dim") or self.head_dim or 0
        return self.replace(**changes) if changes else self

    def shrunk(self, d_model: int) -> AttentionSpec:
        """Four heads; keys and values stay one, fewer than the queries or as many; an own head width stays apart."""
        fewer = 1 if self.num_kv_heads == 1 else 2
        whole = self.resolved(d_model)
        head_dim = TINY_D_MODEL // 4 if whole.num_heads * (whole.head_dim or 0) == d_model else 24
        changes: dict[str, Any] = {
            "num_heads": 4,
            "num_kv_heads": 4 if self.num_kv_heads == self.num_heads else fewer,
            "head_dim": head_dim,
            "v_head_dim": head_dim if whole.v_head_dim == whole.head_dim else 16,
            "window": self.window and min(self.window, 32),
            "rope": self.rope and self.rope.shrunk(head_dim),
            "indexer": self.indexer and self.indexer.shrunk(head_dim),
        }
        if self.scale is not None:  # in the same proportion to the usual scale
            changes["scale"] = self.scale * ((whole.head_dim or 1) / head_dim) ** 0.5
        if self.query_scale is not None:
            changes["query_scale"] = self.query_scale.replace(original_context=TINY_CONTEXT)
        return self.replace(**changes)
