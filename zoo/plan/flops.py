"""Floating-point operations, before any tensor exists.

Matrix products only: norms, activations, rotations, softmax and look-ups are left out, as in torch's FlopCounterMode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from zoo.plan.trunk import HEAD, row_name, slot_costs
from zoo.spec.model import ModelSpec
from zoo.spec.pattern import expand


@dataclass(frozen=True)
class FlopCount:
    """Forward FLOPs of one token, averaged over the tokens of a sequence; a multiply-add counts 2."""

    seq_len: int
    by_block: Mapping[str, float]
    """Slots with their parts (`attention`, `attention.scores`, `moe.experts`), then `head`; rows sum to the total."""

    mtp: float = 0.0
    """Multi-token prediction with its logits, which only training computes; 0 unless it is enabled."""

    @property
    def total(self) -> float:
        """The trunk."""
        return sum(self.by_block.values())

    @property
    def training(self) -> float:
        """Forward and backward: every product needs two more of its size for its two gradients."""
        return 3 * (self.total + self.mtp)


def count_flops(spec: ModelSpec, seq_len: int, *, skip_masked: bool = True) -> FlopCount:
    """FLOPs of a model, every token's logits included.

    Args:
        seq_len: tokens of a sequence; a query meets the keys before it and itself.
        skip_masked: count of a query's products with keys only those that the mask leaves, on average over the
            sequence. False: `seq_len` keys for every query, as counters of dense products do (FlopCounterMode).
    """
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, found {seq_len}")
    slots = {slot: cost.flops(seq_len, skip_masked) for slot, cost in slot_costs(spec).items()}
    logits = 2 * spec.d_model * spec.vocab_size
    further = 0.0
    if spec.mtp is not None and spec.mtp.enabled:
        layers = sum(_layers_flops(spec, expand(spec.mtp.layers), slots).values())
        further = spec.mtp.depth * (2 * 2 * spec.d_model**2 + layers + logits)
    return FlopCount(seq_len, {**_layers_flops(spec, spec.layer_kinds, slots), HEAD: logits}, further)


def _layers_flops(spec: ModelSpec, layers: Iterable[str], slots: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The rows of `layers`, given the parts of every slot."""
    kinds = [spec.kinds[kind] for kind in layers]
    uses = Counter(slot for kind in kinds for slot in (kind.mixer, kind.ffn, kind.beside) if slot)
    return {row_name(slot, part): uses[slot] * flops for slot in uses for part, flops in slots[slot].items()}
