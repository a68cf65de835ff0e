"""Blocks of multi-token prediction: how configs speak of them and under which names checkpoints hold them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.hf.homes import Home, Rows
from zoo.hf.keys import Keys
from zoo.hf.rows import Tree
from zoo.hf.weights import Same, Swapped, WeightRow
from zoo.spec.model import ModelSpec
from zoo.spec.pattern import expand

DEEPSEEK_NAMES = {
    "embed_norm": "model.layers.{first}.enorm",
    "hidden_norm": "model.layers.{first}.hnorm",
    "proj": "model.layers.{first}.eh_proj",
    "norm": "model.layers.{last}.shared_head.norm",
}
NEMOTRON_NAMES = {
    "embed_norm": "mtp.layers.{first}.enorm",
    "hidden_norm": "mtp.layers.{first}.hnorm",
    "proj": "mtp.layers.{first}.eh_proj",
    "norm": "mtp.layers.{last}.final_layernorm",
}
QWEN_NAMES = {
    "embed_norm": "mtp.pre_fc_norm_embedding",
    "hidden_norm": "mtp.pre_fc_norm_hidden",
    "proj": "mtp.fc",
    "norm": "mtp.norm",
}


@dataclass(frozen=True)
class MTPNames:
    """Stored names of the blocks. Their layers are named like the trunk's, under other numbers."""

    names: Mapping[str, str] = field(default_factory=lambda: DEEPSEEK_NAMES)
    """What a block has beside its layers; `{first}` and `{last}` are the numbers of its layers."""
    trunk: str = "model."
    """What names of the trunk's layers begin with before `layers`."""
    blocks: str = "model."
    """What those of the blocks begin with. Where it is the same, numbers go on from the trunk's, else from 0."""
    copies: tuple[str, ...] = (r"embed_tokens\.weight", r"shared_head\.head\.weight")
    """Below a layer: copies of the embedding and the head, which blocks share with the trunk."""
    hidden_first: bool = False
    """The projection's left half reads the hidden state, not the embedding."""

    def homes(self, spec: ModelSpec, rows: Mapping[str, Rows]) -> Iterator[tuple[str, Home]]:
        """Where the blocks of an enabled description are stored, by what names of their parameters begin with.

        Args:
            rows: for each kind of layer the statements that hold in it alone.
        """
        assert spec.mtp is not None
        kinds = expand(spec.mtp.layers)
        first = spec.num_layers if self.blocks == self.trunk else 0
        for block in range(spec.mtp.num_blocks):
            numbers = {"first": first, "last": first + len(kinds) - 1}
            own = tuple(self._row(ours, name.format(**numbers)) for ours, name in self.names.items())
            yield f"mtp.{block}.", Home(str(first), own)
            for index, kind in enumerate(kinds):
                rename = {f"{self.trunk}layers.": f"{self.blocks}layers."}
                yield f"mtp.{block}.layers.{index}.", Home(str(first + index), rows[kind], rename)
            first += len(kinds)

    def _row(self, ours: str, theirs: str) -> WeightRow:
        if ours == "proj" and self.hidden_first:
            return Swapped(f"mtp.{{n}}.{ours}.weight", f"{theirs}.weight")
        return Same(f"mtp.{{n}}.{ours}.weight", (f"{theirs}.weight",))

    def left_out(self, spec: ModelSpec) -> Iterator[str]:
        """Patterns of what a checkpoint may hold of blocks that are described but not built, or holds twice."""
        if spec.mtp is None:
            return
        if self.blocks != self.trunk:
            if not spec.mtp.enabled:
                yield rf"{re.escape(self.blocks)}.*"
            return
        num_layers = spec.mtp.num_blocks * len(expand(spec.mtp.layers))
        numbers = "|".join(str(spec.num_layers + index) for index in range(num_layers))
        rest = "|".join(self.copies) if spec.mtp.enabled else ".*"
        yield rf"{re.escape(self.blocks)}layers\.(?:{numbers})\.(?:{rest})"


@dataclass(frozen=True)
class MTP:
    """Blocks of one layer each, whose number is a key; they are described and not enabled."""

    layers: str
    """Pattern over the family's kinds."""
    key: str = "num_nextn_predict_layers"
    absent: int = 0
    """What absence means."""

    def read(self, keys: Keys, model: Tree) -> None:
        depth = keys.integer(self.key, 0, 100) if keys.take(self.key, None) is not None else self.absent
        model.set("mtp", {"layers": self.layers, "depth": depth} if depth else None)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        config[self.key] = (model.get("mtp") or {}).get("depth", 0)
