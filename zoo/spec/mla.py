"""Multi-head latent attention."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from zoo.spec.attention import QueryScaleSpec
from zoo.spec.base import problem, register_spec
from zoo.spec.block import MixerSpec, scaled
from zoo.spec.indexer import IndexerSpec
from zoo.spec.rope import TINY_CONTEXT, DynamicScaling, LongRopeScaling, RopeSpec


@register_spec
class MLASpec(MixerSpec):
    """Attention whose keys and values are read out of one small latent per token (arXiv:2405.04434, section 2.1).

    A query or key head is `nope_head_dim` channels without positions, then `rope_head_dim` channels that turn. The
    turning part of the keys is one head that all heads share.
    """

    type: Literal["mla"] = "mla"
    num_heads: PositiveInt
    d_kv_latent: PositiveInt
    """Width of the latent that keys and values are read out of."""
    d_q_latent: PositiveInt | None = None
    """Width of the latent that queries are read out of; absent: they are projected from the input."""
    nope_head_dim: PositiveInt
    rope_head_dim: NonNegativeInt
    """May be 0 when `rope` is absent."""
    v_head_dim: PositiveInt
    latent_bias: bool = False
    """Biases of the projections from the input to latents and shared key."""
    out_bias: bool = False
    latent_eps: PositiveFloat | None = None
    """Of the norms of the latents; absent: the eps of the model's norm."""
    rope: RopeSpec | None = RopeSpec()
    """Absent: no positions; the shared key is still there, unturned."""
    query_scale: QueryScaleSpec | None = None
    scale: PositiveFloat | None = None
    """Factor on query-key products; absent: (nope_head_dim + rope_head_dim) ** -0.5, with yarn's `mscale_all_dim` times
    the square of its temperature."""
    gate: Literal["none", "element", "head"] = "none"
    """Sigmoid gate on the output from the block's input, per channel or per head, before the output projection."""
    indexer: IndexerSpec | None = None
    """Attend only to the keys that it chooses; absent: to all earlier ones."""

    @property
    def qk_head_dim(self) -> int:
        """Channels of a query or key head."""
        return self.nope_head_dim + self.rope_head_dim

    @model_validator(mode="after")
    def _check(self) -> MLASpec:
        if self.rope is not None:
            if self.rope.fraction != 1:
                raise problem(("rope", "fraction"), self.rope.fraction, "must be 1: rope_head_dim says how much turns")
            if isinstance(self.rope.scaling, (DynamicScaling, LongRopeScaling)):
                rule = "must not follow the sequence's length: remembered keys are turned once and for all"
                raise problem(("rope", "scaling", "type"), self.rope.scaling.type, rule)
            if self.rope_head_dim < 2 or self.rope_head_dim % 2:
                advice = "or set rope to null"
                raise problem(
                    "rope_head_dim", self.rope_head_dim, "must be even and at least 2 for rotary positions", advice
                )
            if self.indexer is not None and self.indexer.head_dim < self.rope_head_dim:
                rule = f"must be at least rope_head_dim ({self.rope_head_dim})"
                raise problem(("indexer", "head_dim"), self.indexer.head_dim, rule)
        return self

    def shrunk(self, d_model: int) -> MLASpec:
        """Four heads of 16 + 32 channels; latents in proportion."""
        rope_head_dim = 32 if self.rope_head_dim else 0
        changes: dict[str, Any] = {
            "num_heads": 4,
            "d_kv_latent": scaled(self.d_kv_latent, d_model),
            "d_q_latent": self.d_q_latent and scaled(self.d_q_latent, d_model),
            "nope_head_dim": 16,
            "rope_head_dim": rope_head_dim,
            "v_head_dim": 16 if self.v_head_dim == self.nope_head_dim else 24,
            "rope": self.rope and self.rope.shrunk(rope_head_dim),
            "indexer": self.indexer and self.indexer.shrunk(rope_head_dim),
        }
        if self.scale is not None:  # in the same proportion to the usual scale
            changes["scale"] = self.scale * (self.qk_head_dim / (16 + rope_head_dim)) ** 0.5
        if self.query_scale is not None:
            changes["query_scale"] = self.query_scale.replace(original_context=TINY_CONTEXT)
        return self.replace(**changes)
