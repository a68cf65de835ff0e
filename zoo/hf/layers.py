"""Which blocks the layers hold: what a config says by counts, steps and lists, and a model by its pattern."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from zoo.hf.keys import Keys, refused

MAX_LAYERS = 2000
"""Ten times the deepest release: an absurd count is refused before lists of its length are made."""

Pair = tuple[str | None, str | None]
"""The slots of a layer: sequence mixer and channel mixer."""


class Choice(Protocol):
    """Which of its slots each layer uses for one of its two branches."""

    def read(self, keys: Keys, num_layers: int) -> list[str]: ...

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        """Whether the config says it fully is found out by reading it back."""


@dataclass(frozen=True)
class Always:
    """All layers use the same slot."""

    slot: str

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        return [self.slot] * num_layers

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Listed:
    """A key holds one name per layer, like `layer_types`. Where it is absent or null, a rule fills it in."""

    key: str
    slots: Mapping[str, str]
    """Name in the config to slot."""
    rule: Callable[[Keys, int], list[str]]

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        names = keys.take(self.key, None)
        by_rule = self.rule(keys, num_layers)
        if names is None:
            return by_rule
        if not isinstance(names, list) or len(names) != num_layers:
            raise refused(self.key, names, f"must be a list of {num_layers} names, one for each layer")
        for name in names:
            if not isinstance(name, str) or name not in self.slots:
                raise refused(self.key, name, f"understood: {', '.join(self.slots)}")
        return [self.slots[name] for name in names]

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        names = {slot: name for name, slot in self.slots.items()}
        config[self.key] = [names.get(slot or "") for slot in chosen]


@dataclass(frozen=True)
class SparseSteps:
    """Every `decoder_sparse_step`-th layer is sparse, but for those that `mlp_only_layers` names."""

    dense: str = "mlp"
    sparse: str = "moe"

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        step = keys.integer("decoder_sparse_step", 1, 1_000_000)
        only = keys.take("mlp_only_layers")
        if only is not None and not (isinstance(only, list) and all(isinstance(layer, int) for layer in only)):
            raise refused("mlp_only_layers", only, "must be a list of layer numbers")
        dense = set(only or ())
        return [
            self.sparse if (layer + 1) % step == 0 and layer not in dense else self.dense for layer in range(num_layers)
        ]

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        config["decoder_sparse_step"] = 1
        config["mlp_only_layers"] = [layer for layer, slot in enumerate(chosen) if slot == self.dense]


@dataclass(frozen=True)
class FirstDense:
    """The first so many layers are dense, all others sparse."""

    key: str = "first_k_dense_replace"
    listed: str | None = "mlp_layer_types"
    """A key that names the type of each layer instead, `dense` or `sparse`; None: the family has none."""
    write_list: bool = False
    """Write the list, not the number."""
    dense: str = "mlp"
    sparse: str = "moe"

    def read(self, keys: Keys, num_layers: int) -> list[str]:
        def rule(keys: Keys, num_layers: int) -> list[str]:
            first = min(keys.integer(self.key, 0, 1_000_000), num_layers)
            return [self.dense] * first + [self.sparse] * (num_layers - first)

        if self.listed is None or keys.take(self.listed, None) is None:
            return rule(keys, num_layers)
        keys.take(self.key, None)
        return Listed(self.listed, {"dense": self.dense, "sparse": self.sparse}, rule).read(keys, num_layers)

    def write(self, chosen: Sequence[str | None], config: dict[str, Any]) -> None:
        if self.write_list and self.listed is not None:
            config[self.listed] = ["dense" if slot == self.dense else "sparse" for slot in chosen]
        else:
            first = next((layer for layer, slot in enumerate(chosen) if slot != self.dense), len(chosen))
            config[self.key] = first


def every_fourth_full(keys: Keys, num_layers: int) -> list[str]:
    """Three sliding layers, then one that sees all."""
    return ["attention" if (layer + 1) % 4 == 0 else "local" for layer in range(num_layers)]


def every_second_full(keys: Keys, num_layers: int) -> list[str]:
    """One sliding layer, then one that sees all."""
    return ["attention" if layer % 2 else "local" for layer in range(num_layers)]


def all_full(keys: Keys, num_layers: int) -> list[str]:
    """No layer has a window."""
    return ["attention"] * num_layers


def windows(rule: Callable[[Keys, int], list[str]], full: str = "attention", sliding: str = "local") -> Listed:
    """`layer_types` of layers that see all and of layers with a window."""
    return Listed("layer_types", {"full_attention": full, "sliding_attention": sliding}, rule)


@dataclass(frozen=True)
class Layers:
    """The layers of a family."""

    mixers: Choice
    ffns: Choice
    kinds: Mapping[str, Pair]
    """Name of a kind to its slots."""
    count: str = "num_hidden_layers"
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Name of a kind to further fields: placements, a slot `beside`."""

    def read(self, keys: Keys) -> list[str]:
        """The kind of every layer."""
        num_layers = keys.integer(self.count, 1, MAX_LAYERS)
        pairs = zip(self.mixers.read(keys, num_layers), self.ffns.read(keys, num_layers), strict=True)
        names = {slots: name for name, slots in self.kinds.items()}
        return [names[pair] for pair in pairs]

    def write(self, pairs: Sequence[Pair], config: dict[str, Any]) -> None:
        config[self.count] = len(pairs)
        self.mixers.write([mixer for mixer, _ in pairs], config)
        self.ffns.write([ffn for _, ffn in pairs], config)
