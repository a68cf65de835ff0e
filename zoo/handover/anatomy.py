"""The parts of a model as other engines name them: one attention, one dense block, one mixture, in an order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from zoo.handover.refusals import Refusals
from zoo.spec.block import BlockSpec, FFNSpec, MixerSpec
from zoo.spec.model import ModelSpec

CARRIED = (
    "name",
    "card",
    "d_model",
    "vocab_size",
    "slots",
    "kinds",
    "layers",
    "norm",
    "embedding",
    "head",
    "mtp",
    "init",
)
"""What either target looks at; all else of a model has to be at its default."""


@dataclass(frozen=True)
class Anatomy:
    """A model, layer by layer."""

    spec: ModelSpec

    @cached_property
    def mixers(self) -> tuple[str | None, ...]:
        """The slot of every layer's sequence mixer."""
        return tuple(self.spec.kinds[kind].mixer for kind in self.spec.layer_kinds)

    @cached_property
    def ffns(self) -> tuple[str | None, ...]:
        """The slot of every layer's channel mixer."""
        return tuple(self.spec.kinds[kind].ffn for kind in self.spec.layer_kinds)

    @property
    def num_writes(self) -> int:
        """Branches that write to the residual stream."""
        return sum(slot is not None for slot in (*self.mixers, *self.ffns))

    def used(self, base: type[BlockSpec]) -> dict[str, BlockSpec]:
        """The blocks of a kind that layers use, by slot, in the order of their first layer."""
        slots = dict.fromkeys(slot for pair in zip(self.mixers, self.ffns, strict=True) for slot in pair if slot)
        return {slot: self.spec.slots[slot] for slot in slots if isinstance(self.spec.slots[slot], base)}

    def refuse_strange(self, refusals: Refusals) -> None:
        """Refuse what neither target has: other residual streams, blocks beside others, more than one of a kind."""
        spec = self.spec
        refusals.rest(spec, "model", CARRIED)
        for name, kind in spec.kinds.items():
            refusals.rest(kind, f"model.kinds.{name}", ("mixer", "ffn"))
        refusals.rest(spec.embedding, "model.embedding", ("positions",))
        refusals.rest(spec.head, "model.head", ("tied",))
        refusals.rest(spec.norm, "model.norm", ("type", "eps", "weight", "bias"))
        for base in (MixerSpec, FFNSpec):
            if not self.used(base):
                refusals.no("model.layers", spec.layers, f"needs layers with {base.__name__[:-4].lower()}s")
