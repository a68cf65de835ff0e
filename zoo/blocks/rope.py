"""Rotary position embeddings: frequencies under every scaling, and the rotation itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.blocks.autocast import without_autocast
from zoo.blocks.base import Context
from zoo.blocks.compiled_mixers import fits
from zoo.blocks.compiled_trunk import Turn
from zoo.spec.rope import (
    BandsScaling,
    DynamicScaling,
    LinearScaling,
    LongRopeScaling,
    NtkAlphaScaling,
    ProportionalScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

Frequencies = tuple[Tensor, float]
"""Radians per position [dim / 2] fp32, and the temperature that cos and sin are multiplied by."""


def frequencies(spec: RopeSpec, dim: int, seq_len: int, device: torch.device | None = None) -> Frequencies:
    """How fast each pair of `dim` channels turns in a sequence of `seq_len` tokens."""
    rule = _RULES[type(spec.scaling)] if spec.scaling else _unscaled
    inv_freq, temperature = rule(spec.scaling, spec.theta, dim, seq_len)
    return inv_freq.to(device), temperature


def depends_on_length(spec: RopeSpec) -> bool:
    """Whether the frequencies of all positions change as a sequence grows; then keys are remembered unrotated."""
    return isinstance(spec.scaling, (DynamicScaling, LongRopeScaling))


def turn(x: Tensor, spec: RopeSpec, dim: int, context: Context, layout: str | None = None) -> Tensor:
    """Turn the leading `dim` channels of queries or keys x [b, n, h, k] by their positions.

    Args:
        x: the n tokens up to the end of this pass: those of the pass, or with them the remembered ones.
        layout: instead of the one of `spec`.
    """
    positions = None if x.shape[1] == context.positions.shape[1] else all_positions(context, x.shape[1])
    cos, sin = rotary_tables(spec, dim, context, positions)
    return rotate(x, cos, sin, layout or spec.layout, spec.arithmetic)


def all_positions(context: Context, num_keys: int) -> Tensor:
    """[b or 1, num_keys] int64: the places of remembered keys and those of this pass, which are contiguous."""

    def make() -> Tensor:
        end = context.past + context.positions.shape[1]
        slots = torch.arange(end - num_keys, end, device=context.positions.device)[None]
        return slots if context.padding is None else (slots - context.padding[:, None]).clamp_min(0)

    return context.once(("positions", num_keys), make)


def rotary_tables(spec: RopeSpec, dim: int, context: Context, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin [b or 1, s, dim / 2] fp32 of `positions` (default: those of the pass).

    Args:
        spec: theta and scaling; its `fraction` is already in `dim`.
        dim: channels that turn.
        positions: [b or 1, s] int64.
    """
    places = context.positions if positions is None else positions

    def make() -> tuple[Tensor, Tensor]:
        # Reading the largest position waits for the device: only the scalings that need the length pay for it.
        seq_len = int(context.positions.max()) + 1 if depends_on_length(spec) else 0
        inv_freq, temperature = frequencies(spec, dim, seq_len, places.device)
        with without_autocast(places.device):
            angles = places[..., None].to(torch.float32) * inv_freq
        if spec.arithmetic == "complex":
            spin = torch.polar(torch.ones_like(angles), angles)
            return spin.real * temperature, spin.imag * temperature
        return angles.cos() * temperature, angles.sin() * temperature

    key = ("rope", spec.theta, spec.scaling, spec.arithmetic == "complex", dim)
    return context.once((*key, None if positions is None else id(positions)), make)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str, arithmetic: str = "model") -> Tensor:
    """Turn the leading channels of every head; the others pass through.

    Args:
        x: [b, s, h, k].
        cos, sin: [b or 1, s, r / 2], r <= k channels turn.
        layout: `half` turns channel i with i + r/2, `interleaved` 2i with 2i + 1.
        arithmetic: as `RopeSpec.arithmetic`.
    """
    if arithmetic == "complex":
        return _rotate_complex(x, cos, sin)
    if arithmetic == "fp32" and x.dtype != torch.float32:
        # Never by the kernel, which rounds a product and a sum at once: few and many tokens must agree in x's dtype.
        return _rotate_plainly(x.to(torch.float32), cos, sin, layout).to(x.dtype)
    if fits(x, cos, sin):
        y: Tensor = Turn.apply(x, cos, sin, layout != "half")
        return y
    return _rotate_plainly(x, cos, sin, layout)


def _rotate_plainly(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    half = cos.shape[-1]
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    turning, still = x[..., : 2 * half], x[..., 2 * half :]
    if layout == "half":
        first, second = turning[..., :half], turning[..., half:]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    else:
        first, second = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    return torch.cat((turned, still), -1) if still.shape[-1] else turned


def _rotate_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs as complex numbers. Heads stand before tokens, as where such models come from: the last bit of
    a product depends on how it falls into vector registers."""
    turning, still = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), -1)
    pairs = turning.transpose(1, 2).to(torch.float32)
    spun = torch.view_as_complex(pairs.reshape(*pairs.shape[:-1], -1, 2)) * torch.complex(cos, sin)[:, None]
    turned = torch.view_as_real(spun).flatten(-2).to(x.dtype).transpose(1, 2)
    return torch.cat((turned, still), -1) if still.shape[-1] else turned


def _powers(theta: float, dim: int) -> Tensor:
    """theta ** (2i / dim) [dim / 2] fp32, the wavelengths over 2 pi."""
    powers: Tensor = theta ** (torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim)
    return powers


def _unscaled(scaling: None, theta: float, dim: int, seq_len: int) -> Frequencies:
    return 1.0 / _powers(theta, dim), 1.0


def _linear(scaling: LinearScaling, theta: float, dim: int, seq_len: int) -> Frequencies:
    return 1.0 / _powers(theta, dim) / scaling.factor, 1.0


def _dynamic(scaling: DynamicScaling, theta: float, dim: int, seq_len: int) -> Frequencies:
    length = max(seq_len, scaling.original_context)
    growth = scaling.factor * length / scaling.original_context - (scaling.factor - 1)
    return 1.0 / _powers(theta * growth ** (dim / (dim - 2)), dim), 1.0


def _ntk_alpha(scaling: NtkAlphaScaling, theta: float, dim: int, seq_len: int) -> Frequencies:
    return 1.0 / _powers(theta * scaling.alpha ** (dim / (dim - 2)), dim), 1.0


def _bands(scaling: BandsScaling, theta: float, dim: int, seq_len: int) -> Frequencies:
    inv_freq = 1.0 / _powers(theta, dim)
    turns = scaling.original_context / (2 * math.pi / inv_freq)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * inv_freq / scaling.factor + blend * inv_freq, 1.0


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """The temperature of YaRN: 0.1 * mscale * ln(factor) + 1 (arXiv:2309.00071, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(scaling: YarnScaling, theta: float, dim: int, seq_len: int) -> Frequencies:
    def channel_of(num_turns: float) -> float:
        """The channel pair that turns `num_turns` times over the original context."""
        return dim * math.log(scaling.original_context / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel_of(scaling.beta_fast), channel_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0.0
    powers = _powers(theta, dim)
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    inv_freq = 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept
    if scaling.attention_factor is not None:
        return inv_freq, scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        ratio = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
        return inv_freq, ratio
    return inv_freq, yarn_mscale(scaling.factor)


def _longrope(scaling: LongRopeScaling, theta: float, dim: int, seq_len: int) -> Frequencies:
    beyond = seq_len > scaling.original_context
    factors = torch.tensor(scaling.long_factor if beyond else scaling.short_factor, dtype=torch.float32)
    inv_freq = 1.0 / (factors * _powers(theta, dim))
    if not beyond and scaling.short_attention_factor is not None:
        return inv_freq, scaling.short_attention_factor
    if scaling.attention_factor is not None:
        return inv_freq, scaling.attention_factor
    if scaling.factor <= 1:
        return inv_freq, 1.0
    return inv_freq, math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_context))


def _proportional(scaling: ProportionalScaling, theta: float, dim: int, seq_len: int) -> Frequencies:
    turning = int(scaling.fraction * dim // 2)
    inv_freq = 1.0 / _powers(theta, dim)
    inv_freq[turning:] = 0.0
    return inv_freq / scaling.factor, 1.0


_RULES: dict[type[RopeScaling], Callable[[Any, float, int, int], Frequencies]] = {
    LinearScaling: _linear,
    DynamicScaling: _dynamic,
    NtkAlphaScaling: _ntk_alpha,
    BandsScaling: _bands,
    YarnScaling: _yarn,
    LongRopeScaling: _longrope,
    ProportionalScaling: _proportional,
}
