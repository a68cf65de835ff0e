"""Rotary positions as Megatron-Core has them."""

from __future__ import annotations

import math

from zoo.handover.fields import Field
from zoo.handover.refusals import Refusals
from zoo.spec.attention import AttentionSpec
from zoo.spec.mla import MLASpec
from zoo.spec.rope import BandsScaling, LinearScaling, RopeSpec, YarnScaling

BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192}
"""What `RotaryEmbedding._apply_scaling` takes for granted; only the factor is an option."""


def whole(number: float) -> float | int:
    """A number that is whole as an integer, as `rotary_base` is one."""
    return int(number) if float(number).is_integer() else number


def rope_fields(block: AttentionSpec, path: str, refusals: Refusals) -> list[Field]:
    """Of plain attention."""
    rope = block.rope
    if rope is None:
        fusion = Field("apply_rope_fusion", False, f"{path}: nothing turns")
        return [Field("position_embedding_type", "none", f"{path}.rope: none"), fusion]
    refusals.rest(rope, f"{path}.rope", ("theta", "layout", "fraction", "scaling"), ("arithmetic",))
    kind = "yarn" if isinstance(rope.scaling, YarnScaling) else "rope"
    made = [
        Field("position_embedding_type", kind, f"{path}.rope"),
        Field("rotary_base", whole(rope.theta), f"{path}.rope.theta"),
        Field("rotary_percent", rope.fraction, f"{path}.rope.fraction"),
        Field("rotary_interleaved", rope.layout == "interleaved", f"{path}.rope.layout"),
    ]
    if kind == "yarn" and rope.layout == "interleaved":
        refusals.no(f"{path}.rope.layout", rope.layout, "turns neighbours only without yarn")
    return made + _scaling(rope, f"{path}.rope.scaling", refusals)


def _scaling(rope: RopeSpec, path: str, refusals: Refusals) -> list[Field]:
    scaling = rope.scaling
    if scaling is None:
        return []
    if isinstance(scaling, LinearScaling):
        return [Field("seq_len_interpolation_factor", scaling.factor, f"{path}.factor")]
    if isinstance(scaling, BandsScaling):
        for name, value in BANDS.items():
            if getattr(scaling, name) != value:
                refusals.no(f"{path}.{name}", getattr(scaling, name), f"has {value} built in")
        return [Field("rope_scaling", True, path), Field("rope_scaling_factor", scaling.factor, f"{path}.factor")]
    if not isinstance(scaling, YarnScaling):
        refusals.no(f"{path}.type", scaling.type, "knows linear, bands and yarn")
        return []
    _check_temperature(scaling, path, refusals)
    both = bool(scaling.mscale and scaling.mscale_all_dim)
    return [
        Field("yarn_rotary_scaling_factor", scaling.factor, f"{path}.factor"),
        Field("yarn_original_max_position_embeddings", scaling.original_context, f"{path}.original_context"),
        Field("yarn_beta_fast", scaling.beta_fast, f"{path}.beta_fast"),
        Field("yarn_beta_slow", scaling.beta_slow, f"{path}.beta_slow"),
        Field("yarn_mscale", scaling.mscale if both else None, f"{path}.mscale"),
        Field("yarn_mscale_all_dim", scaling.mscale_all_dim if both else None, f"{path}.mscale_all_dim"),
        Field("yarn_correction_range_round_to_int", scaling.truncate, f"{path}.truncate"),
    ]


def latent_rope_fields(block: MLASpec, path: str, refusals: Refusals) -> list[Field]:
    """Of latent attention, which has fields of its own for it."""
    rope, where = block.rope, f"{path}.rope"
    if rope is None:
        refusals.no(where, None, "always turns the shared part of latent attention")
        return []
    refusals.rest(rope, where, ("theta", "layout", "scaling"), ("arithmetic",))
    if rope.layout == "half":
        refusals.notes.append(
            f"{where}.layout=half: latent attention turns neighbours there, which is the same function of permuted rows"
        )
    scaling = rope.scaling
    made = [
        Field("rope_type", "rope" if scaling is None else "yarn", where),
        Field("rotary_base", whole(rope.theta), f"{where}.theta"),
        Field("apply_rope_fusion", False, "zoo export: the unfused form is the one that is always there"),
    ]
    if scaling is None:
        # The scores are scaled by the yarn factor whatever the type (`multi_latent_attention.py`): 1 leaves them alone.
        return [*made, Field("rotary_scaling_factor", 1.0, f"{where}.scaling: none")]
    where = f"{where}.scaling"
    if not isinstance(scaling, YarnScaling):
        refusals.no(f"{where}.type", scaling.type, "knows yarn alone in latent attention")
        return made
    _check_temperature(scaling, where, refusals)
    if not scaling.truncate:
        refusals.no(f"{where}.truncate", False, "rounds in latent attention")
    both = bool(scaling.mscale and scaling.mscale_all_dim)
    if scaling.mscale_all_dim and not both:
        refusals.no(f"{where}.mscale_all_dim", scaling.mscale_all_dim, "needs mscale beside it")
    return [
        *made,
        Field("rotary_scaling_factor", scaling.factor, f"{where}.factor"),
        Field("original_max_position_embeddings", scaling.original_context, f"{where}.original_context"),
        Field("beta_fast", scaling.beta_fast, f"{where}.beta_fast"),
        Field("beta_slow", scaling.beta_slow, f"{where}.beta_slow"),
        Field("mscale", scaling.mscale if both else 1.0, f"{where}.mscale"),
        Field("mscale_all_dim", scaling.mscale_all_dim or 0.0, f"{where}.mscale_all_dim"),
    ]


def _check_temperature(scaling: YarnScaling, path: str, refusals: Refusals) -> None:
    """Megatron-Core derives the temperature from the factor and the two mscales, as `attention_factor` absent does."""
    given = scaling.attention_factor
    if given is not None and not math.isclose(given, temperature(scaling.replace(attention_factor=None))):
        refusals.no(f"{path}.attention_factor", given, "derives it from factor, mscale and mscale_all_dim")


def temperature(scaling: YarnScaling) -> float:
    """The factor on cos and sin (arXiv:2309.00071, equation 22)."""

    def of(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return of(scaling.mscale) / of(scaling.mscale_all_dim)
    return of(1.0)
