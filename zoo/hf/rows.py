"""The rows of a config table. Each says one thing about a model in both languages and is read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from zoo.hf.keys import Keys, refused

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""Hugging Face's names of activations; where several mean the same, the first is the one that is written."""


class Tree:
    """A model description as nested plain data, with dotted paths. A path may begin with a slot's name."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        self.data = data if data is not None else {}

    def set(self, path: str, value: Any) -> None:
        *parents, last = path.split(".")
        node = self.data
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value

    def get(self, path: str) -> Any:
        """The value, or None where the path leads to nothing."""
        node: Any = self.data
        for part in path.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node

    def has(self, path: str) -> bool:
        return path.split(".")[0] in self.data


class Row(Protocol):
    """One statement of a table."""

    def read(self, keys: Keys, model: Tree) -> None:
        """Take what the row understands from the config and put it into the model."""

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        """Put into the config what the model says. Whether it says it fully is found out by reading it back."""


@dataclass(frozen=True)
class Field:
    """A field of the model that is a key of the config."""

    path: str
    key: str
    """One spelling or several, parted by spaces. The first is written."""
    values: Mapping[Any, Any] = field(default_factory=dict)
    """Config value to model value, where they differ. Other values are refused."""
    if_null: str | None = None
    """The key whose value is taken where this one is null."""
    times: int = 1
    """What that value is multiplied by."""
    inside: str | None = None
    """The config's value is an object, which holds this one under that key."""

    def read(self, keys: Keys, model: Tree) -> None:
        names = self.key.split()
        value = keys.take_first(names)
        if value is None and self.if_null is not None:
            value = keys.take(self.if_null)
            value = value * self.times if isinstance(value, int) else value
        if self.inside is not None and isinstance(value, Mapping):
            value = value.get(self.inside)
        if self.values:
            if not isinstance(value, (str, int, float, type(None))) or value not in self.values:
                raise refused(names[0], value, f"understood: {', '.join(map(repr, self.values))}")
            value = self.values[value]
        model.set(self.path, value)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        if not model.has(self.path):
            return
        value = model.get(self.path)
        if self.values:
            value = next((hf for hf, zoo in self.values.items() if zoo == value), None)
        config[self.key.split()[0]] = value if self.inside is None else {self.inside: value}


@dataclass(frozen=True)
class Uniform(Field):
    """A field whose key may hold a list with an item for each layer, all of them equal."""

    def read(self, keys: Keys, model: Tree) -> None:
        names = self.key.split()
        value = keys.take_first(names)
        if isinstance(value, list):
            if not value or any(item != value[0] for item in value):
                raise refused(names[0], value, "must be the same in all layers")
            value = value[0]
        model.set(self.path, value)


@dataclass(frozen=True)
class Computed:
    """A field of the model that is a function of a number in the config."""

    path: str
    key: str
    read_as: Callable[[float], Any]
    write_as: Callable[[Any], float | None]
    if_null: Any = None
    """What null means."""

    def read(self, keys: Keys, model: Tree) -> None:
        value = keys.take(self.key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
            raise refused(self.key, value, "must be a positive number")
        model.set(self.path, self.if_null if value is None else self.read_as(value))

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        if model.has(self.path):
            value = model.get(self.path)
            config[self.key] = None if value is None else self.write_as(value)


def whole(value: float) -> float | int:
    """The integer that a number equals to rounding, or the number."""
    return round(value) if round(value) and abs(value / round(value) - 1) < 1e-12 else value


def multiplier(path: str, key: str) -> Computed:
    """A factor on the embedding."""
    return Computed(
        path,
        key,
        lambda factor: "none" if factor == 1 else factor,
        lambda scale: 1.0 if scale == "none" else scale if isinstance(scale, float) else None,
    )


def inverse(path: str, key: str) -> Computed:
    """A factor that the config gives as a divisor."""
    return Computed(path, key, lambda divisor: 1 / divisor, lambda factor: whole(1 / factor))


def inverse_root(path: str, key: str) -> Computed:
    """A factor that the config gives as a width, whose root divides."""
    return Computed(path, key, lambda width: width**-0.5, lambda factor: whole(factor**-2))


@dataclass(frozen=True)
class Const:
    """A field that is the same in the whole family and has no key."""

    path: str
    value: Any

    def read(self, keys: Keys, model: Tree) -> None:
        model.set(self.path, self.value)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Twofold:
    """A number that is a key of the config and, on the hub, one of an object in it; there it beats the other."""

    path: str
    key: str
    inside: str

    def read(self, keys: Keys, model: Tree) -> None:
        outside = keys.take(self.key, None)
        found = keys.take(self.inside, outside)
        model.set(self.path, keys.default(self.key) if found is None else found)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        if model.has(self.path):
            config[self.key] = config[self.inside] = model.get(self.path)


@dataclass(frozen=True)
class SameAs:
    """A field that has the value of another one, whose row stands before."""

    path: str
    other: str

    def read(self, keys: Keys, model: Tree) -> None:
        model.set(self.path, model.get(self.other))

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Agrees:
    """A key, or a list with an item for each layer, that must say what another row has read; it may be absent."""

    key: str
    path: str

    def read(self, keys: Keys, model: Tree) -> None:
        found, wanted = keys.take(self.key, None), model.get(self.path)
        if found is not None and any(item != wanted for item in (found if isinstance(found, list) else [found])):
            raise refused(self.key, found, f"understood: {wanted!r}, in all layers")

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class SharedWidth:
    """The summed width of shared experts, which become one; 0 or null: there is none."""

    slot: str
    key: str

    def read(self, keys: Keys, model: Tree) -> None:
        width = keys.take(self.key)
        model.set(f"{self.slot}.num_shared_experts", 1 if width else 0)
        own = model.get(f"{self.slot}.d_expert")
        model.set(f"{self.slot}.d_shared_expert", width if width and width != own else None)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        moe = model.get(self.slot)
        if moe is not None:
            config[self.key] = moe["num_shared_experts"] * (moe["d_shared_expert"] or moe["d_expert"])


@dataclass(frozen=True)
class Only:
    """A key that is understood with one value alone, which is also what its absence means."""

    key: str
    value: Any
    also: tuple[Any, ...] = ()
    """Values that mean the same."""
    written: bool = False
    """Write it, for readers whose defaults are others."""

    def read(self, keys: Keys, model: Tree) -> None:
        found = keys.take(self.key, self.value)
        if found != self.value and found not in self.also:
            raise refused(self.key, found, f"understood: {self.value!r}")

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        if self.written:
            config[self.key] = self.value


@dataclass(frozen=True)
class Inert:
    """A key that configs of the family hold and that its class in transformers does not read."""

    key: str

    def read(self, keys: Keys, model: Tree) -> None:
        keys.take(self.key, None)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Equal:
    """A key that must equal another one, which also takes its place where it is absent or null."""

    key: str
    other: str

    def read(self, keys: Keys, model: Tree) -> None:
        found, wanted = keys.take(self.key, None), keys.take(self.other)
        if found is not None and found != wanted:
            raise refused(self.key, found, f"must be {self.other} ({wanted!r})")

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        config[self.key] = config.get(self.other)


@dataclass(frozen=True)
class Window:
    """A sliding window over all layers of a slot, or none where the key is null."""

    slot: str
    switch: str | None = None
    """A key that must be true for the window to count."""

    def read(self, keys: Keys, model: Tree) -> None:
        window = keys.take("sliding_window")
        if self.switch is not None and not keys.take(self.switch):
            window = None
        model.set(f"{self.slot}.mask", "causal" if window is None else "sliding")
        model.set(f"{self.slot}.window", window)

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        window = model.get(f"{self.slot}.window")
        config["sliding_window"] = window
        if self.switch is not None:
            config[self.switch] = window is not None


@dataclass(frozen=True)
class Context:
    """The longest sequence. A model that does not say gets `UNKNOWN`, which limits nothing in a rotary model."""

    UNKNOWN = 4096
    key: str = "max_position_embeddings"
    """Spellings, as in `Field`."""

    def read(self, keys: Keys, model: Tree) -> None:
        model.set("card.context", keys.take_first(self.key.split()))

    def write(self, model: Tree, config: dict[str, Any]) -> None:
        config[self.key.split()[0]] = model.get("card.context") or self.UNKNOWN


def trunk(eps: str = "rms_norm_eps", context: str = "max_position_embeddings") -> Iterator[Row]:
    """What nearly every family says in the same words, but for the spellings of the norms' eps and the context."""
    yield Field("d_model", "hidden_size")
    yield Field("vocab_size", "vocab_size")
    yield Field("norm.eps", eps)
    yield Field("head.tied", "tie_word_embeddings")
    yield Field("init.std", "initializer_range")
    yield Context(context)
    yield Only("is_encoder_decoder", False)
    yield Only("is_decoder", False)
    yield Only("add_cross_attention", False)
    yield Only("tie_encoder_decoder", False)


def heads(slot: str = "attention") -> Iterator[Row]:
    """The head counts of an attention."""
    yield Field(f"{slot}.num_heads", "num_attention_heads")
    yield Field(f"{slot}.num_kv_heads", "num_key_value_heads", if_null="num_attention_heads")
    yield Only("attention_dropout", 0.0)


def swiglu(slot: str = "mlp") -> Iterator[Row]:
    """A gated MLP."""
    yield Field(f"{slot}.d_ffn", "intermediate_size")
    yield Field(f"{slot}.activation", "hidden_act", ACTIVATIONS)
